"""The exact sum: against fractions, in every order, and what does not fit is refused before it is added."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import bits

from fedllm.aggregate import total as total_module
from fedllm.aggregate.compiled import compiled_loops
from fedllm.aggregate.total import GRID_BITS, GridSum, to_grid
from fedllm.errors import PayloadError
from fedllm.wire.blob import FileBlob, in_memory, parts_of, write_parts
from fedllm.wire.stored import StoredTensors, scan, table_of

STEP = Fraction(1, 2**GRID_BITS)
values_strategy = st.floats(-100, 100, width=32)
terms_strategy = st.lists(
    st.tuples(st.integers(1, 5000), st.lists(values_strategy, min_size=3, max_size=3)), min_size=1, max_size=6
)


def on_grid(value: float) -> Fraction:
    # Python's round() of a Fraction is to even, as torch's is.
    return round(Fraction(value) / STEP) * STEP


def summed(terms: list[tuple[int, list[float]]], counts: list[float] | None = None) -> GridSum:
    grid = GridSum()
    for index, (weight, values) in enumerate(terms):
        number = {"x": counts[index]} if counts else {}
        grid.add({"w": torch.tensor(values)}, weight=weight, counts=number, sender=f"p{index}")
    return grid


@given(terms=terms_strategy)
@settings(max_examples=80)
def test_the_mean_is_the_exact_weighted_mean_of_the_rounded_values(terms: list[tuple[int, list[float]]]) -> None:
    total = sum(weight for weight, _ in terms)
    means = summed(terms).means()["w"].tolist()
    for place, found in enumerate(means):
        exact = sum((weight * on_grid(values[place]) for weight, values in terms), Fraction(0)) / total
        assert found == pytest.approx(float(exact), rel=1.2e-7, abs=1e-12)
        unrounded = sum((weight * Fraction(values[place]) for weight, values in terms), Fraction(0)) / total
        assert abs(Fraction(found) - unrounded) <= STEP / 2 + abs(unrounded) * Fraction(1, 2**23)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32])
@pytest.mark.parametrize("largest", [1.0, 2 - 2**-23, 2.0, 2 + 2**-22, 1000.0])
@pytest.mark.parametrize("weight", [1, 3, 5000])
def test_the_sum_is_that_of_the_values_on_the_grid_whatever_their_size_and_type(
    dtype: torch.dtype, largest: float, weight: int
) -> None:
    tensor = torch.linspace(-largest, largest, 2 * 2**17 + 5, dtype=torch.float64).to(dtype)
    grid = GridSum()
    for _ in range(2):
        grid.add({"w": tensor}, weight=weight, counts={}, sender="north")
    assert grid._sums is not None
    assert torch.equal(grid._sums["w"], 2 * weight * to_grid(tensor))


@given(terms=terms_strategy, data=st.data())
@settings(max_examples=50)
def test_every_order_gives_the_same_bits(terms: list[tuple[int, list[float]]], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(terms))
    assert bits(summed(terms).means()) == bits(summed(shuffled).means())


def test_every_order_of_tensors_and_counts_gives_the_same_bits_where_floats_would_not() -> None:
    values = [1e4, 1e-4, -1e4, 3e-9]
    terms = [(7 + i, [value, value / 3, -value]) for i, value in enumerate(values)]
    floats = {sum(weight * triple[1] for weight, triple in order) for order in itertools.permutations(terms)}
    assert len(floats) > 1
    found = set()
    for order in itertools.permutations(terms):
        grid = summed(list(order), counts=[triple[1] for _, triple in order])
        found.add((bits(grid.means())["w"], grid.counts()["x"], grid.weight))
    assert len(found) == 1


def test_halves_go_to_the_even_neighbour() -> None:
    half = 0.5 / 2**GRID_BITS
    assert to_grid(torch.tensor([half, 3 * half, 5 * half, -half], dtype=torch.float64)).tolist() == [0, 2, 2, 0]


def test_what_could_leave_64_bits_is_refused_by_name_and_nothing_is_added() -> None:
    grid = GridSum()
    grid.add({"a": torch.ones(2), "b": torch.ones(2)}, weight=3, counts={"x": 1.0}, sender="north")
    with pytest.raises(PayloadError) as caught:
        too_large = {"a": torch.ones(2), "b": torch.tensor([0.0, -(2.0**31)])}
        grid.add(too_large, weight=4, counts={"x": 1.0}, sender="south")
    assert (caught.value.code, caught.value.where) == ("SUM_OVERFLOW", "south")
    assert (grid.weight, grid.counts()) == (3, {"x": 1.0})
    assert {name: tensor.tolist() for name, tensor in grid.means().items()} == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_parties_that_fit_alone_but_not_together_are_refused() -> None:
    grid = GridSum()
    grid.add({"w": torch.tensor([2.0**32 * 0.9])}, weight=1, counts={}, sender="north")
    with pytest.raises(PayloadError, match="SUM_OVERFLOW"):
        grid.add({"w": torch.tensor([2.0**32 * 1.2])}, weight=1, counts={}, sender="south")
    assert grid.means()["w"].item() == pytest.approx(2.0**32 * 0.9)


@given(weight=st.integers(1, 2**33), exponent=st.floats(-40, 34), repeats=st.integers(1, 4))
@settings(max_examples=80)
def test_whatever_is_accepted_does_not_overflow(weight: int, exponent: float, repeats: int) -> None:
    value = torch.tensor([2.0**exponent], dtype=torch.float32)
    grid, exact = GridSum(), Fraction(0)
    try:
        for _ in range(repeats):
            grid.add({"w": value}, weight=weight, counts={}, sender="north")
            exact += weight * on_grid(value.item())
    except PayloadError:
        pass
    if grid.weight:
        assert grid.means()["w"].item() == pytest.approx(float(exact / grid.weight), rel=1e-6)


@pytest.mark.parametrize("weight", [0, -1])
def test_a_weight_below_one_is_refused(weight: int) -> None:
    with pytest.raises(PayloadError):
        GridSum().add({"w": torch.ones(1)}, weight=weight, counts={}, sender="north")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_and_nothing_is_added(value: float) -> None:
    grid = GridSum()
    with pytest.raises(PayloadError):
        grid.add({"a": torch.ones(1), "b": torch.tensor([0.0, value])}, weight=1, counts={}, sender="north")
    with pytest.raises(PayloadError):
        grid.add({"a": torch.ones(1)}, weight=1, counts={"x": value}, sender="north")
    assert (grid.weight, grid.means(), grid.counts()) == (0, {}, {})


@pytest.mark.parametrize("value", [1e300, -1.7e308])
def test_a_count_beyond_reason_is_refused_and_nothing_is_added(value: float) -> None:
    grid = GridSum()
    with pytest.raises(PayloadError) as caught:
        grid.add({"w": torch.ones(1)}, weight=1, counts={"tokens": value}, sender="north")
    assert caught.value.where == "north"
    assert (grid.weight, grid.means(), grid.counts()) == (0, {}, {})


@given(numbers=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=8), data=st.data())
@settings(max_examples=50)
def test_counts_are_summed_unweighted_and_in_any_order(numbers: list[float], data: st.DataObject) -> None:
    found = set()
    for order in (numbers, data.draw(st.permutations(numbers))):
        grid = GridSum()
        for number in order:
            grid.add({}, weight=5, counts={"loss": number, "tokens": 3}, sender="north")
        found.add((grid.counts()["loss"], grid.counts()["tokens"]))
    assert len(found) == 1
    loss, tokens = found.pop()
    assert loss == pytest.approx(float(sum(map(Fraction, numbers))), abs=1e-8 * len(numbers), rel=1e-12)
    assert tokens == 3 * len(numbers)


def test_memory_does_not_grow_with_the_number_of_parties() -> None:
    grid, held = GridSum(), []
    generator = torch.Generator().manual_seed(0)
    for number in range(64):
        grid.add({"w": torch.randn(1000, generator=generator)}, weight=1, counts={"x": 1.0}, sender=f"p{number}")
        # All that hangs on the sum: one accumulator per tensor, one number per count.
        assert grid._sums is not None
        held.append(len(grid._sums._flat))
    assert set(held) == {1000}
    assert set(vars(grid)) == {"weight", "_sums", "_shapes", "_pieces", "_counts", "_bound"}


def test_an_update_is_not_kept_after_it_was_added() -> None:
    import gc
    import weakref

    grid = GridSum()
    for _ in range(2):
        update = {"w": torch.ones(10)}
        seen = weakref.ref(update["w"])
        grid.add(update, weight=1, counts={}, sender="north")
        del update
        gc.collect()
        assert seen() is None


def test_an_empty_sum_has_no_means() -> None:
    assert GridSum().means() == {}
    assert GridSum().counts() == {}


@pytest.fixture(params=["in passes", "compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make sums of any size by NumPy's passes, or at once by what numba compiles."""
    found: str = request.param
    monkeypatch.setattr(total_module, "_WORTH_COMPILING", 0 if found == "compiled" else 2**63)
    assert compiled_loops(), "the extra `test` has numba"
    return found


def test_without_numba_the_sum_is_made_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled_loops.cache_clear()
    try:
        assert compiled_loops() is None
        grid = GridSum()
        grid.add({"w": torch.ones(2**20)}, weight=3, counts={}, sender="north")
        assert torch.equal(grid.means()["w"], torch.ones(2**20))
    finally:
        compiled_loops.cache_clear()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("size", [0, 1, 2**17 - 1, 2**17, 2**18 + 3])
def test_a_sum_in_pieces_is_the_sum_of_grid_counts(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    scale = 10.0 ** torch.randint(-12, 3, (size,), generator=generator).double()
    terms = [((torch.randn(size, generator=generator).double() * scale).to(dtype), weight) for weight in (1, 7, 2**20)]
    grid, exact = GridSum(), torch.zeros(size, dtype=torch.int64)
    for values, weight in terms:
        grid.add({"w": values.reshape(size, 1)}, weight=weight, counts={}, sender="north")
        exact += to_grid(values) * weight
    expected = (exact.double() / (grid.weight * 2.0**GRID_BITS)).float()
    assert torch.equal(grid.means()["w"], expected.reshape(size, 1))


def peak_while(action: Callable[[], None]) -> float:
    """Return by how many MB memory rose above what it was before, at most."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_mb("VmRSS")
    action()
    return memory_mb("VmHWM") - before


def memory_mb(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of memory to be read here")
def test_updates_in_files_are_added_without_holding_one(tmp_path: Path) -> None:
    # 48 MB an update, in 12 tensors: two accumulators' worth and one tensor are held, however many parties there are.
    tensors = {f"u/t{number}": torch.randn(1_000_000) for number in range(12)}
    path = tmp_path / "update"
    with path.open("wb") as handle:
        note = write_parts(parts_of(tensors), handle.write)
    payload_mb = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    del tensors
    blob = FileBlob(path, *note)

    def add(parties: int) -> None:
        grid = GridSum()
        for number in range(parties):
            table = table_of(blob)
            largest, bad = scan(blob, table)
            assert not bad
            grid.add(StoredTensors(blob, table, largest["u"]), weight=1, counts={}, sender=f"p{number}")
        assert len(grid.means()) == 12

    add(1)
    peaks = {parties: peak_while(lambda parties=parties: add(parties)) for parties in (4, 16)}
    assert peaks[4] < 2.5 * payload_mb
    assert (peaks[16] - peaks[4]) / 12 < 5


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("edge", [2.0**20, 2.0**20 - 2.0**-4, 2.0**20 + 1, 2.0**21])
def test_large_and_small_values_are_rounded_alike(edge: float) -> None:
    # Whether the largest value of an update is below 2**20 decides how all of them are rounded.
    odd = [k * 0.5 / 2**GRID_BITS for k in (-3.0, -1.0, 1.0, 3.0, 5.0)]
    grid, exact = GridSum(), torch.zeros(7, dtype=torch.int64)
    for values, weight in (([*odd, edge, -1 / 3], 3), ([*odd, 0.25, 1 / 3], 5)):
        tensor = torch.tensor(values, dtype=torch.float64)
        grid.add({"w": tensor}, weight=weight, counts={}, sender="north")
        exact += weight * to_grid(tensor)
        assert grid._sums is not None
        assert torch.equal(grid._sums["w"], exact)


@pytest.mark.usefixtures("way")
def test_a_message_in_memory_in_a_file_and_plain_tensors_give_the_same_bits(tmp_path: Path) -> None:
    tensors = {f"u/{name}": torch.randn(2**17 // 3 + index) for index, name in enumerate("zyxwv")}
    tensors |= {"u/half": torch.randn(7).half(), "u/brain": torch.randn(9).bfloat16(), "u/empty": torch.empty(0)}
    path = tmp_path / "update"
    with path.open("wb") as handle:
        in_file = FileBlob(path, *write_parts(parts_of(tensors), handle.write))
    found = []
    for blob in (None, in_file, in_memory(parts_of(tensors))):
        grid = GridSum()
        for weight in (3, 5):
            stored = tensors if blob is None else StoredTensors(blob, table_of(blob), 8.0)
            grid.add(stored, weight=weight, counts={}, sender="north")
        found.append(bits(grid.means()))
    assert found[0] == found[1] == found[2]
    assert found[0].keys() == tensors.keys()
