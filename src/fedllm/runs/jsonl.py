"""Files of one JSON object a line that survive a crash: appended with fsync, a torn last line ignored."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedllm.errors import ResourceError

Row = dict[str, Any]


def disk_error(error: OSError, path: Path) -> ResourceError:
    """Return the error to raise when a file of the run cannot be written.

    Args:
        error: What the system said.
        path: The file.
    """
    fix = "free some space, or move the run folder; then `fedllm resume RUN`"
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


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN becomes null.

    Args:
        path: The file.
        value: What to write.
    """
    write_atomic(path, (json.dumps(finite(value), ensure_ascii=False, indent=2) + "\n").encode())


def finite(value: Any) -> Any:
    """Return the value with NaN and infinities as None, since JSON has neither.

    Args:
        value: A JSON-like value.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def encode_rows(rows: Iterable[Row]) -> bytes:
    """Return rows as lines of JSON; NaN becomes null.

    Args:
        rows: The rows.
    """
    lines = (json.dumps(finite(row), ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    return "".join(lines).encode()


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows durably. A torn last line, left by a crash, is cut off first.

    Args:
        path: The file; made if absent.
        rows: What to append.

    Raises:
        ResourceError: `DISK_FULL`.
    """
    try:
        is_new = not path.exists()
        _cut_torn_line(path)
        with path.open("ab") as handle:
            handle.write(encode_rows(rows))
            handle.flush()
            os.fsync(handle.fileno())
        if is_new:
            sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from None


def _cut_torn_line(path: Path) -> None:
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as handle:
        handle.seek(-1, os.SEEK_END)
        if handle.read(1) != b"\n":
            data = path.read_bytes()
            handle.truncate(data.rfind(b"\n") + 1)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; none if it is absent. What is not whole JSON is passed over.

    Args:
        path: The file.
    """
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
