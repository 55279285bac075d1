"""Blobs: the safetensors library as the reference, reading in pieces, and values that may not be."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from tiny import bits

from fedllm.wire.blob import DTYPES, FileBlob, MemoryBlob, in_memory, in_place, parts_of, read, whole, write_parts
from fedllm.wire.stored import StoredTensors, largest_of, magnitude, scan, table_of, values_of

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
specs_strategy = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10),
    st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2**31)),
    max_size=6,
)


def tensors_of(specs: dict[str, Any]) -> dict[str, torch.Tensor]:
    made = {}
    for name, (dtype, shape, seed) in specs.items():
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50
        made[name] = (values.abs() if dtype == torch.uint8 else values).to(dtype)
    return made


def in_file(folder: Path, data: bytes, *, start: int = 0) -> FileBlob:
    path = folder / "blob"
    path.write_bytes(b"\xff" * start + data)
    return FileBlob(path, MemoryBlob(data).digest, len(data), start=start)


@given(specs=specs_strategy)
@settings(max_examples=60)
def test_the_library_reads_what_is_written_here(specs: dict[str, Any]) -> None:
    tensors = tensors_of(specs)
    assert bits(load_safetensors(bytes(whole(in_memory(parts_of(tensors)))))) == bits(tensors)


@given(specs=specs_strategy)
@settings(max_examples=60)
def test_what_the_library_writes_is_read_here(specs: dict[str, Any]) -> None:
    tensors = tensors_of(specs)
    blob = MemoryBlob(save_safetensors(tensors))
    assert bits(dict(StoredTensors(blob, table_of(blob)))) == bits(tensors)


@given(specs=specs_strategy, start=st.integers(0, 9))
@settings(max_examples=30)
def test_a_file_reads_as_memory_does(specs: dict[str, Any], start: int, tmp_path_factory: Any) -> None:
    data = bytes(whole(in_memory(parts_of(tensors_of(specs)))))
    memory, file = MemoryBlob(data), in_file(tmp_path_factory.mktemp("blob"), data, start=start)
    assert (memory.size, memory.digest) == (file.size, file.digest)
    assert table_of(memory) == table_of(file)
    assert bits(dict(StoredTensors(memory, table_of(memory)))) == bits(dict(StoredTensors(file, table_of(file))))
    assert scan(memory, table_of(memory)) == scan(file, table_of(file))
    assert bytes(whole(file)) == data


def test_each_tensor_begins_at_a_multiple_of_its_width() -> None:
    tensors = {f"t{number}": torch.zeros(3, dtype=dtype) for number, dtype in enumerate(DTYPES.values())}
    for entry in table_of(in_memory(parts_of(tensors))).values():
        assert entry.start % DTYPES[entry.dtype].itemsize == 0


def test_writing_in_pieces_gives_the_blob_s_digest_and_size() -> None:
    tensors = {"a": torch.randn(7, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.zeros(0)}
    blob, written = in_memory(parts_of(tensors)), bytearray()
    assert write_parts(parts_of(tensors), written.extend) == (blob.digest, blob.size)
    assert written == whole(blob)


def test_tensors_are_read_when_they_are_looked_at_and_are_copies(tmp_path: Path) -> None:
    blob = in_file(tmp_path, bytes(whole(in_memory(parts_of({"f/a": torch.ones(4), "f/b": torch.zeros(2)})))))
    tensors = StoredTensors(blob, table_of(blob))
    tensors["f/a"].fill_(7)
    assert tensors["f/a"].tolist() == [1.0] * 4
    assert {name: spec.shape for name, spec in tensors.specs.items()} == {"f/a": [4], "f/b": [2]}
    blob.discard()
    blob.discard()
    assert set(tensors) == {"f/a", "f/b"} and set(tensors.specs) == {"f/a", "f/b"}
    with pytest.raises(OSError):
        tensors["f/a"]


def test_a_file_that_became_shorter_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    blob = in_file(tmp_path, bytes(range(100)))
    blob.path.write_bytes(bytes(99))
    assert read(blob, 0, 99) == bytes(99)
    with pytest.raises(OSError, match="shorter"):
        read(blob, 90, 10)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_bad_value_is_found_in_any_place_and_the_tensor_is_named(value: float, dtype: torch.dtype) -> None:
    draw = random.Random(0)
    sizes = {"f/a": 3, "f/b": 2**18 + 5, "g/c": 1, "g/d": 1000}
    for name in sizes:
        tensors = {key: torch.ones(size, dtype=dtype) for key, size in sizes.items()}
        tensors["g/n"] = torch.arange(5)
        for place in {0, sizes[name] - 1, draw.randrange(sizes[name])}:
            tensors[name].fill_(1)[place] = value
            blob = in_memory(parts_of(tensors))
            assert scan(blob, table_of(blob))[1] == name
            assert not math.isfinite(magnitude(tensors[name]))
            assert not math.isfinite(largest_of(tensors))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_magnitude_is_found_for_each_field(dtype: torch.dtype) -> None:
    tensors = {"f/a": torch.tensor([1.0, -3.0]), "f/b": torch.tensor([2.0]), "g/a": torch.tensor([0.5, 0.25])}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors |= {"f/n": torch.tensor([-8, 2]), "g/empty": torch.zeros(0), "h/x": torch.zeros(3)}
    blob = in_memory(parts_of(tensors))
    assert scan(blob, table_of(blob)) == ({"f": 8.0, "g": 0.5, "h": 0.0}, "")


def test_a_boolean_is_0_or_1() -> None:
    data = bytearray(whole(in_memory(parts_of({"f/a": torch.tensor([True, False]), "f/b": torch.tensor([True])}))))
    assert scan(MemoryBlob(data), table_of(MemoryBlob(data))) == ({"f": 1.0}, "")
    data[-1] = 2
    assert scan(MemoryBlob(data), table_of(MemoryBlob(data)))[1] == "f/b"


def test_fields_that_lie_between_one_another_are_told_apart() -> None:
    # Another writer may lay the tensors out in any order.
    table = b'{"f/a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    table += b'"g/n":{"dtype":"I32","shape":[1],"data_offsets":[4,8]},'
    table += b'"f/b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}'
    data = torch.tensor([1.0]).numpy().tobytes() + b"\xff\xff\xff\x7f" + torch.tensor([2.0]).numpy().tobytes()
    blob = MemoryBlob(len(table).to_bytes(8, "little") + table + data)
    assert scan(blob, table_of(blob)) == ({"f": 2.0, "g": float(2**31 - 1)}, "")


@pytest.mark.parametrize("shapes", [[], [(0,)], [(3,)], [(1000,), (0,), (7, 5), ()]])
def test_tensors_in_place_are_the_same_bytes_as_a_copy(shapes: list[tuple[int, ...]]) -> None:
    tensors = {f"t{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    view, copy = in_place(parts_of(tensors)), in_memory(parts_of(tensors))
    assert (view.size, view.digest, whole(view)) == (copy.size, copy.digest, whole(copy))
    for start in range(0, copy.size, 13):
        for length in (0, 1, 64, copy.size - start):
            length = min(length, copy.size - start)
            assert read(view, start, length) == read(copy, start, length)


def test_tensors_in_place_are_not_copied() -> None:
    tensors = {"w": torch.zeros(4)}
    view = in_place(parts_of(tensors))
    tensors["w"][3] = 1.0
    assert whole(view)[-4:] == torch.ones(1).numpy().tobytes()


@given(specs=specs_strategy, most=st.integers(1, 40))
@settings(max_examples=60)
def test_all_values_come_in_the_order_of_names_wherever_they_lie(specs: Any, most: int, tmp_path_factory: Any) -> None:
    tensors = {
        name: torch.arange(math.prod(shape)).reshape(shape).to(dtype) for name, (dtype, shape, _) in specs.items()
    }
    path = tmp_path_factory.mktemp("blob") / "blob"
    with path.open("wb") as handle:
        in_file = FileBlob(path, *write_parts(parts_of(tensors), handle.write))
    blobs = [in_memory(parts_of(tensors)), MemoryBlob(bytes(whole(in_file))), in_file]
    expected = [value for name in sorted(tensors) for value in tensors[name].reshape(-1).tolist()]
    for found in (tensors, *(StoredTensors(blob, table_of(blob)) for blob in blobs)):
        pieces = [piece.tolist() for piece in values_of(found, most)]
        assert all(len(piece) <= most for piece in pieces)
        assert [value for piece in pieces for value in piece] == expected


def test_neighbours_in_a_blob_are_read_together_and_not_copied() -> None:
    tensors = {f"u/{number}": torch.full((3,), float(number)) for number in range(4)}
    blob = in_memory(parts_of(tensors))
    (piece,) = values_of(StoredTensors(blob, table_of(blob)), 100)
    assert piece.tolist() == [0.0] * 3 + [1.0] * 3 + [2.0] * 3 + [3.0] * 3
    assert isinstance(blob.data, bytearray)
    blob.data[-4:] = torch.tensor([9.0]).numpy().tobytes()
    assert piece[-1] == 9.0
