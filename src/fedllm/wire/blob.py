"""Tensors as bytes in safetensors format, in memory or in a file, written and read in pieces."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch

# What may travel, in safetensors' words. Other dtypes have no use here, and not all of them can be checked or summed.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WORDS = {dtype: word for word, dtype in DTYPES.items()}

Buffer = bytes | bytearray | memoryview


class Blob(Protocol):
    """Bytes by the name of their SHA-256. Threads may read at the same time."""

    @property
    def digest(self) -> str:
        """SHA-256 of all bytes, in hex."""
        ...

    @property
    def size(self) -> int:
        """How many bytes there are."""
        ...

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on.

        Raises:
            OSError: They cannot be read (any more).
        """
        ...

    def discard(self) -> None:
        """Let go of the bytes."""
        ...


def read(blob: Blob, offset: int, length: int) -> bytearray:
    """Return a copy of some bytes of a blob.

    Args:
        blob: The blob.
        offset: Where they begin.
        length: How many.
    """
    data = bytearray(length)
    blob.read_into(offset, memoryview(data))
    return data


def whole(blob: Blob) -> Buffer:
    """Return all bytes of a blob; not a copy where it is in memory.

    Args:
        blob: The blob.
    """
    return blob.data if isinstance(blob, MemoryBlob) else read(blob, 0, blob.size)


@dataclass(frozen=True)
class MemoryBlob:
    """A blob in memory; nobody changes `data`. See `Blob`."""

    data: Buffer

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all bytes, in hex."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return len(self.data)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on."""
        target[:] = memoryview(self.data)[offset : offset + len(target)]

    def discard(self) -> None:
        """Nothing to do."""


@dataclass(frozen=True, eq=False)
class ViewBlob:
    """Tensors where they lie in memory; nobody changes them as long as it is offered. See `Blob`."""

    views: tuple[memoryview, ...]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(map(len, self.views))]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all bytes, in hex."""
        return write_parts(self.views, lambda part: None)[0]

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self._starts[-1]

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on."""
        number, done = bisect_right(self._starts, offset) - 1, 0
        while done < len(target):
            at = offset + done - self._starts[number]
            part = self.views[number][at : at + len(target) - done]
            target[done : done + len(part)] = part
            done, number = done + len(part), number + 1

    def discard(self) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class FileBlob:
    """A blob in a file, from `start` on. See `Blob`."""

    path: Path
    digest: str
    size: int
    start: int = 0

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on."""
        handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(target):
                count = os.preadv(handle, [target[done:]], self.start + offset + done)
                if not count:
                    raise OSError(f"{self.path} is shorter than it was")
                done += count
        finally:
            os.close(handle)

    def discard(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def parts_of(tensors: Mapping[str, torch.Tensor]) -> Iterator[Buffer]:
    """Yield a safetensors file in pieces, each tensor a view of the tensor's own memory where that is possible.

    Tensors of wide types come first, then by name, so that each begins at a multiple of its own width.

    Args:
        tensors: The named tensors, on any device.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    table, at = {}, 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": _WORDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if tensors[name].numel():
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data


def in_memory(parts: Iterable[Buffer]) -> MemoryBlob:
    """Return a blob that holds a copy of the pieces.

    Args:
        parts: From `parts_of`.
    """
    return MemoryBlob(bytearray().join(parts))


def in_place(parts: Iterable[Buffer]) -> ViewBlob:
    """Return a blob of the pieces where they are, without a copy.

    Args:
        parts: From `parts_of`; the tensors must stay as they are while the blob is in use.
    """
    return ViewBlob(tuple(memoryview(part) for part in parts))


def write_parts(parts: Iterable[Buffer], write: Callable[[Buffer], Any]) -> tuple[str, int]:
    """Write pieces one after another and return their SHA-256 and how many bytes they were.

    Args:
        parts: From `parts_of`.
        write: Takes the bytes, such as an open file's `write`.
    """
    digest, size = hashlib.sha256(), 0
    for part in parts:
        digest.update(part)
        write(part)
        size += len(part)
    return digest.hexdigest(), size
