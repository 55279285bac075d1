"""Files that are whole after a crash, folders that one process holds, and what to say when the disk refuses."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from fedllm.errors import ConfigError, ResourceError

_POLL_S = 0.05


def disk_error(error: OSError, path: Path) -> ResourceError:
    """Return the error to raise when a file or folder cannot be written.

    Args:
        error: What the system said.
        path: The file or folder.
    """
    fix = "free some space, or make the folder writable; then `fedllm resume RUN`, or the same command again"
    return ResourceError("DISK_FULL", f"cannot write: {error.strerror}", where=str(path), fix=fix)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder durable.

    Args:
        folder: The folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_private(folder: Path) -> Path:
    """Return a folder that only its owner can enter if it had to be made.

    Args:
        folder: The folder; an existing one keeps its mode.

    Raises:
        ResourceError: `DISK_FULL`.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from None
    return folder


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is either the old one or the new one, whole.

    Args:
        path: The file.
        data: Its content.

    Raises:
        ResourceError: `DISK_FULL`; the old file is untouched.
    """
    write_atomic_parts(path, (data,))


def write_atomic_parts(
    path: Path,
    parts: Iterable[bytes | bytearray | memoryview],
    *,
    head_bytes: int = 0,
    head: Callable[[], bytes] = bytes,
) -> None:
    """Write a file as `write_atomic` does, from pieces that need not be in memory at once.

    Args:
        path: The file.
        parts: Its content, after the head.
        head_bytes: How long the head is.
        head: Returns what comes first; called when all parts are written.

    Raises:
        ResourceError: `DISK_FULL`; the old file is untouched.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("wb") as handle:
            handle.seek(head_bytes)
            for part in parts:
                handle.write(part)
            if head_bytes:
                # While the head is still being made.
                handle.flush()
                os.fsync(handle.fileno())
            handle.seek(0)
            handle.write(head())
            handle.flush()
            os.fsync(handle.fileno())
        draft.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise disk_error(error, path) from None


def hold(lock: Path, what: str, *, fix: str, patience_s: float = 0.0) -> IO[str]:
    """Return a lock file's handle; the lock is this process's until the handle is closed, or the process ends.

    Args:
        lock: The file; made if absent.
        what: What is wrong when another process has it.
        fix: How to mend that.
        patience_s: How long to wait for another process to let go.

    Raises:
        ConfigError: `RUN_EXISTS`, another process has it.
    """
    handle = lock.open("w")
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() < until:
                time.sleep(_POLL_S)
                continue
            handle.close()
            raise ConfigError("RUN_EXISTS", what, where=str(lock.parent), fix=fix) from None
    os.set_inheritable(handle.fileno(), False)
    return handle
