"""Tensors that lie in a blob: its table, and its values read one tensor or one piece at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch

from fedllm.wire.blob import DTYPES, Blob, Buffer, MemoryBlob, read
from fedllm.wire.payload import TensorSpec, manifest_of

MAX_TABLE_BYTES = 16 * 2**20
# Values are looked at in pieces that stay in the processor's cache.
_SCAN_BYTES = 2**18
_SEEN_AS = {"BOOL": torch.uint8}


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
