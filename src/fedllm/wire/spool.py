"""Blobs on disk as they arrive: pulled in pieces, resumed where one broke off."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path

from fedllm.disk import disk_error
from fedllm.errors import PayloadError
from fedllm.wire.blob import Buffer, FileBlob

# Up to this size tensors travel inside their message, in one call.
INLINE_BYTES = 2**20 + 2**16
MAX_PIECE_BYTES = 2**20
_MIN_PIECE_BYTES = 2**14
_FIRST_PIECE_BYTES = 2**16
# So many pieces are asked for at a time, fewer where each is there at once. What is on its way is lost with the
# connection.
_WINDOW, _NARROW = 4, 2
_AT_ONCE_S = 0.05
# A piece that came sooner is followed by larger ones, one that took longer by smaller ones: what else goes over a slow
# line must not wait behind them.
_SOON_S, _LATE_S = 0.25, 1.0
_RETRY_S = 0.2
# Nothing came for so long, or less than so much a second after so long: it is given up. There is no limit on the whole.
STALL_S = 60.0
_SLOWEST_BYTES = 2**12

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim") else None

# (offset, length) -> the bytes; None: no answer, it is asked again; empty: the other side does not have them.
Ask = Callable[[int, int], Buffer | None]


class Spool:
    """A folder for the blobs of one process. What an earlier process left is removed, but for what it had half pulled.

    Args:
        folder: Made if absent.

    Raises:
        ResourceError: `DISK_FULL`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with _full_disk_told(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if path.suffix != ".part":
                    path.unlink()

    def pull(
        self, digest: str, size: int, *, sender: str, ask: Ask, cancelled: Callable[[], bool] = lambda: False
    ) -> FileBlob:
        """Return a blob pulled from another process, its digest checked. What came earlier is not asked for again.

        Args:
            digest: SHA-256 of the blob, in hex.
            size: Its size; the caller has compared it with what it accepts.
            sender: Whose it is: two senders may send the same bytes.
            ask: Asks the other side for a piece; several threads call it.
            cancelled: Says when to give up.

        Raises:
            PayloadError: `BLOB_MISSING`, the other side does not have it; `PAYLOAD_REFUSED`, it sent something else;
                `ROUND_TIMEOUT`, nothing came for `STALL_S` seconds, or it was cancelled.
            ResourceError: `DISK_FULL`.
        """
        path = self._folder / f"{sender}-{digest}.part"
        with _full_disk_told(path):
            # What an earlier process left may have been damaged since: then all of it is pulled once more.
            for _ in range(1 + path.exists()):
                with path.open("ab+") as handle:
                    part = _Part(handle, size)
                    try:
                        _pull(part, sender, ask, cancelled)
                    except PayloadError as error:
                        if error.code != "ROUND_TIMEOUT":
                            path.unlink()
                        raise
                if part.hash.hexdigest() == digest:
                    return FileBlob(path, digest, size)
                path.unlink()
        raise PayloadError("PAYLOAD_REFUSED", "tensors do not match their digest", where=sender)


class _Part:
    """The beginning of a blob, in a file."""

    def __init__(self, handle: BufferedRandom, size: int) -> None:
        self._handle, self.size = handle, size
        if os.fstat(handle.fileno()).st_size > size:
            handle.truncate(0)
        handle.seek(0)
        self.hash = hashlib.file_digest(handle, "sha256")
        self.offset = self._began_at = handle.seek(0, os.SEEK_END)
        self._began = self._came = time.monotonic()

    def append(self, piece: Buffer) -> None:
        self._handle.write(piece)
        self.hash.update(piece)
        self.offset += len(piece)
        self._came = time.monotonic()

    def is_stalled(self) -> bool:
        now = time.monotonic()
        due = self._began + STALL_S + (self.offset - self._began_at) / _SLOWEST_BYTES
        return now > due or now > self._came + STALL_S


@dataclass
class _Pace:
    """How long the next piece should be, and how many to ask for at a time."""

    length: int = field(default_factory=lambda: _FIRST_PIECE_BYTES)

    window: int = _NARROW

    def took(self, seconds: float) -> None:
        self.window = _NARROW if seconds < _AT_ONCE_S else _WINDOW
        if seconds < _SOON_S:
            self.length = min(2 * self.length, MAX_PIECE_BYTES)
        elif seconds > _LATE_S:
            self.length = max(self.length // 2, _MIN_PIECE_BYTES)


_Asked = Future[tuple[Buffer | None, float]]


def _pull(part: _Part, sender: str, ask: Ask, cancelled: Callable[[], bool]) -> None:
    def timed(offset: int, length: int) -> tuple[Buffer | None, float]:
        started = time.monotonic()
        return ask(offset, length), time.monotonic() - started

    pool = ThreadPoolExecutor(_WINDOW, thread_name_prefix="piece")
    try:
        _fill(part, sender, lambda offset, length: pool.submit(timed, offset, length), cancelled)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _fill(part: _Part, sender: str, submit: Callable[[int, int], _Asked], cancelled: Callable[[], bool]) -> None:
    pace, asked_to = _Pace(), part.offset
    window: deque[tuple[int, _Asked]] = deque()
    while part.offset < part.size:
        while len(window) < pace.window and asked_to < part.size:
            length = min(pace.length, part.size - asked_to)
            window.append((length, submit(asked_to, length)))
            asked_to += length
        length, future = window.popleft()
        piece, seconds = future.result()
        pace.took(seconds if piece is not None else _LATE_S + 1)
        if cancelled() or part.is_stalled():
            raise PayloadError("ROUND_TIMEOUT", f"stopped at {part.offset} of {part.size} bytes", where=sender)
        if piece is None:
            # What was asked for behind it is asked for again: it may have been too much for the line.
            window.clear()
            asked_to = part.offset
            time.sleep(_RETRY_S)
            continue
        if len(piece) != length:
            code = "PAYLOAD_REFUSED" if len(piece) else "BLOB_MISSING"
            raise PayloadError(code, f"{len(piece)} bytes instead of {length}", where=sender)
        part.append(piece)


@contextmanager
def _full_disk_told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from None


def trim_memory() -> None:
    """Give memory that the process has freed back to the system, where its library can."""
    if _LIBC is not None:
        _LIBC.malloc_trim(0)
