"""Tensors as bytes in safetensors format, in memory or in a file, written in pieces and read one by one."""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from fedllm.wire.payload import TensorSpec, manifest_of

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
MAX_TABLE_BYTES = 16 * 2**20
# Values are looked at in pieces that stay in the processor's cache.
_SCAN_BYTES = 2**18
_SEEN_AS = {"BOOL": torch.uint8}

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


class Entry(NamedTuple):
    """Where a tensor is in a blob: its dtype in safetensors' words, its shape, its first byte and the one after it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def parse_json(text: Buffer) -> Any:
    """Return the value of a JSON text in which no key stands twice.

    Args:
        text: UTF-8.

    Raises:
        ValueError: It is not such a text.
    """
    try:
        return json.loads(bytes(text), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def table_of(blob: Blob) -> dict[str, Entry]:
    """Return the blob's tensors in the order of their bytes, every figure checked against the blob's size.

    Args:
        blob: The blob.

    Raises:
        ValueError: The blob is not in safetensors format, or has gaps, overlaps or dtypes that may not travel.
    """
    length = int.from_bytes(read(blob, 0, 8), "little") if blob.size >= 8 else MAX_TABLE_BYTES + 1
    if length > min(MAX_TABLE_BYTES, blob.size - 8):
        raise ValueError("no table")
    table = parse_json(read(blob, 8, length))
    if not isinstance(table, dict):
        raise ValueError("the table is no table")
    at = 8 + length
    entries = sorted(((name, _entry(item, at)) for name, item in table.items()), key=lambda item: item[1][2:])
    for _, entry in entries:
        if entry.start != at:
            raise ValueError("a gap or an overlap")
        at = entry.end
    if at != blob.size:
        raise ValueError("bytes of no tensor")
    return dict(entries)


def _entry(item: Any, base: int) -> Entry:
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("a tensor's line is malformed")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError("a dtype that may not travel")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError("a tensor's line is malformed")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError("a tensor of another size than its shape")
    return Entry(dtype, tuple(shape), base + start, base + end)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


@dataclass(frozen=True, eq=False)
class StoredTensors(Mapping[str, torch.Tensor]):
    """Named tensors in a blob, in the order of their names. Each look at one reads it anew: what is read is a copy.

    `largest` is the largest magnitude of any value, where it was found when the blob was checked.
    """

    blob: Blob
    entries: dict[str, Entry]
    largest: float = math.nan

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        data = read(self.blob, entry.start, entry.end - entry.start)
        return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of each tensor, without reading it."""
        names = {word: str(dtype).removeprefix("torch.") for word, dtype in DTYPES.items()}
        return {
            name: TensorSpec(dtype=names[entry.dtype], shape=list(entry.shape)) for name, entry in self.entries.items()
        }


def values_of(tensors: Mapping[str, torch.Tensor], most: int) -> Iterator[torch.Tensor]:
    """Yield all values in the order of the tensors' names, flat and in pieces, each good until the next one is asked.

    Args:
        tensors: Named tensors. Those that are neighbours in a blob are read together, without a copy where they can be.
        most: The most values in a piece.
    """
    if not isinstance(tensors, StoredTensors):
        for name in sorted(tensors):
            yield from torch.split(tensors[name].detach().to("cpu").reshape(-1), most)
        return
    buffer = bytearray()
    for word, start, end in _runs(tensors.entries):
        dtype = DTYPES[word]
        for at in range(start, end, most * dtype.itemsize):
            length = min(most * dtype.itemsize, end - at)
            if isinstance(tensors.blob, MemoryBlob) and isinstance(tensors.blob.data, bytearray):
                yield torch.frombuffer(tensors.blob.data, dtype=dtype, count=length // dtype.itemsize, offset=at)
                continue
            buffer = buffer if len(buffer) >= length else bytearray(length)
            tensors.blob.read_into(at, memoryview(buffer)[:length])
            yield torch.frombuffer(buffer, dtype=dtype, count=length // dtype.itemsize)


def _runs(entries: Mapping[str, Entry]) -> list[tuple[str, int, int]]:
    """Return dtype, first byte and the byte after the last one, of tensors that follow one another in every respect."""
    runs: list[tuple[str, int, int]] = []
    for _, entry in sorted(entries.items()):
        if runs and (runs[-1][0], runs[-1][2]) == (entry.dtype, entry.start):
            runs[-1] = entry.dtype, runs[-1][1], entry.end
        else:
            runs.append((entry.dtype, entry.start, entry.end))
    return runs


def magnitude(tensor: torch.Tensor) -> float:
    """Return the largest magnitude in a tensor: NaN or infinity if it holds one of them, 0 if it is empty.

    Args:
        tensor: Of any dtype that may travel.
    """
    if not tensor.numel():
        return 0.0
    low, high = (float(bound) for bound in torch.aminmax(tensor))
    return _larger(abs(low), abs(high))


def _larger(first: float, second: float) -> float:
    # NaN counts as the largest.
    return first if first > second or first != first else second


def largest_of(tensors: Mapping[str, torch.Tensor]) -> float:
    """Return the largest magnitude in any of the tensors; NaN or infinity if they hold one of them.

    Args:
        tensors: Named tensors; those of a checked blob are not read again.
    """
    if isinstance(tensors, StoredTensors):
        return tensors.largest
    most = 0.0
    for tensor in tensors.values():
        most = _larger(most, magnitude(tensor))
    return most


def specs_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    """Return dtype and shape of each tensor, in the order of the names; those of a blob are not read.

    Args:
        tensors: Named tensors.
    """
    return tensors.specs if isinstance(tensors, StoredTensors) else manifest_of(tensors)


def scan(blob: Blob, table: Mapping[str, Entry]) -> tuple[dict[str, float], str]:
    """Return the largest magnitude in each field of a blob, and a tensor with values that may not be ("" if none).

    NaN, infinities, and booleans that are neither 0 nor 1 may not be. Memory does not grow with the blob.

    Args:
        blob: The blob.
        table: All its tensors, from `table_of`. A tensor's key is `field/name`.
    """
    most: dict[str, float] = {}
    # Neighbours are looked at together: adapters have many small tensors.
    for (word, field), run in groupby(table.items(), key=lambda item: (item[1].dtype, item[0].partition("/")[0])):
        same = list(run)
        found = _largest_between(blob, word, same[0][1].start, same[-1][1].end)
        if not _may_be(word, found):
            every = ((name, _largest_between(blob, word, entry.start, entry.end)) for name, entry in same)
            return most, next(name for name, largest in every if not _may_be(word, largest))
        most[field] = _larger(most.get(field, 0.0), found)
    return most, ""


def _largest_between(blob: Blob, word: str, start: int, end: int) -> float:
    most, data = 0.0, memoryview(bytearray(min(_SCAN_BYTES, end - start)))
    for at in range(start, end, _SCAN_BYTES):
        view = data[: min(_SCAN_BYTES, end - at)]
        blob.read_into(at, view)
        most = _larger(most, magnitude(torch.frombuffer(view, dtype=_SEEN_AS.get(word, DTYPES[word]))))
    return most


def _may_be(word: str, largest: float) -> bool:
    return largest <= 1 if word == "BOOL" else math.isfinite(largest)
