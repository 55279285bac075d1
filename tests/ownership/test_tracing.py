"""Tracing: whose copy leaked, whatever was done to it; never an innocent party's."""

import math
from collections.abc import Callable

import pytest
import torch

from fedllm.ownership.claims import MarkSite
from fedllm.ownership.tracing import ERROR, Original, Trace, code, marked, site_name, trace
from fedllm.seeds import stream, torch_generator
from fedllm.wire.payload import Tensors

PARTIES = [f"party-{number}" for number in range(8)]
KEY = "5a" * 32
SITES, ROWS, COLUMNS, RANK, SCALE = 12, 48, 40, 4, 2.0
Changes = dict[str, torch.Tensor]


def names(site: int) -> tuple[str, str]:
    return tuple(f"base_model.model.layer.{site}.lora_{factor}.default.weight" for factor in "AB")  # type: ignore[return-value]


def drawn(*labels: str | int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator(3, *labels))


@pytest.fixture(scope="module")
def adapter() -> Tensors:
    found: Tensors = {}
    for site in range(SITES):
        a, b = names(site)
        found |= {a: drawn("a", site, shape=(RANK, COLUMNS)), b: 0.1 * drawn("b", site, shape=(ROWS, RANK))}
    return found


def changes(adapter: Tensors) -> Changes:
    return {f"layer.{site}": SCALE * adapter[names(site)[1]] @ adapter[names(site)[0]] for site in range(SITES)}


def traced(found: Changes, adapter: Tensors, *, key: str = KEY, parties: list[str] = PARTIES) -> Trace:
    originals = [
        Original(MarkSite(name=f"layer.{site}", rows=ROWS, columns=COLUMNS), *(adapter[n] for n in names(site)), SCALE)
        for site in range(SITES)
    ]
    return trace(lambda site, right: found[site.name] @ right, originals, parties, key=key)


def copy_of(adapter: Tensors, party: str) -> Tensors:
    return marked(adapter, party, key=KEY, strength=0.05)


def pruned(found: Changes, share: float) -> Changes:
    limits = {
        name: change.abs().flatten().kthvalue(int(share * change.numel())).values for name, change in found.items()
    }
    return {name: torch.where(change.abs() > limits[name], change, 0.0) for name, change in found.items()}


def noisy(found: Changes, share: float) -> Changes:
    return {
        name: change + share * change.std() * drawn(name, shape=tuple(change.shape)) for name, change in found.items()
    }


DONE: dict[str, Callable[[Changes], Changes]] = {
    "as it is": lambda found: found,
    "merged at one half": lambda found: {name: change / 2 for name, change in found.items()},
    "60 % pruned": lambda found: pruned(found, 0.6),
    "noise of a third": lambda found: noisy(found, 0.33),
}


@pytest.mark.parametrize("done", DONE)
def test_the_party_is_named_whatever_was_done_to_its_copy(adapter: Tensors, done: str) -> None:
    for party in PARTIES:
        found = traced(DONE[done](changes(copy_of(adapter, party))), adapter)
        assert found.named == (party,)
        assert found.scores[0].p_value < ERROR < found.scores[1].p_value


def test_the_mean_of_two_copies_names_both_and_nobody_else(adapter: Tensors) -> None:
    one, other = (changes(copy_of(adapter, party)) for party in ("party-1", "party-6"))
    mean = {name: (change + other[name]) / 2 for name, change in one.items()}
    assert set(traced(mean, adapter).named) == {"party-1", "party-6"}
    assert set(traced(pruned(mean, 0.4), adapter).named) == {"party-1", "party-6"}


def test_other_factors_of_the_same_product_change_nothing(adapter: Tensors) -> None:
    copy = copy_of(adapter, "party-2")
    for site in range(SITES):
        a, b = names(site)
        turn = torch.linalg.qr(drawn("turn", site, shape=(RANK, RANK)))[0] * 3
        copy |= {a: torch.linalg.inv(turn) @ copy[a], b: copy[b] @ turn}
    assert traced(changes(copy), adapter).named == ("party-2",)


def test_without_marks_nobody_can_be_told_from_another(adapter: Tensors) -> None:
    found = traced(noisy(changes(adapter), 0.05), adapter)
    assert found.named == () and "undecided" in found.sentence
    assert traced(changes(adapter), adapter).named == ()
    # The same leak from marked copies is traced: it is the mark that tells.
    assert traced(noisy(changes(copy_of(adapter, "party-4")), 0.05), adapter).named == ("party-4",)


def test_another_key_reads_nothing(adapter: Tensors) -> None:
    assert traced(changes(copy_of(adapter, "party-3")), adapter, key="00" * 32).named == ()


def test_an_innocent_partys_score_is_standard_normal_whatever_leaked(adapter: Tensors) -> None:
    innocent = [f"innocent-{number}" for number in range(400)]
    for leaked in (copy_of(adapter, "party-0"), copy_of(adapter, "party-5")):
        found = traced(pruned(noisy(changes(leaked), 0.2), 0.5), adapter, parties=innocent)
        scores = sorted(score.z for score in found.scores)
        normal = [0.5 * math.erfc(-z / math.sqrt(2)) for z in scores]
        # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed with a chance of one in a thousand.
        gap = max(max(abs(p - k / 400), abs(p - (k + 1) / 400)) for k, p in enumerate(normal))
        assert gap < 1.95 / math.sqrt(400)
        assert found.named == ()


def test_a_suspect_that_is_not_finite_or_has_nothing_in_common_is_undecided(adapter: Tensors) -> None:
    copy = changes(copy_of(adapter, "party-1"))
    assert traced({name: change * torch.nan for name, change in copy.items()}, adapter).named == ()
    other = {
        name: torch.from_numpy(stream(1, name).standard_normal(tuple(c.shape))).float() for name, c in copy.items()
    }
    assert traced(other, adapter).named == ()
    assert traced({name: 0 * change for name, change in copy.items()}, adapter).named == ()


def test_only_factors_b_are_marked_and_each_copy_is_its_own(adapter: Tensors) -> None:
    one, other = copy_of(adapter, "party-1"), copy_of(adapter, "party-2")
    for name, tensor in adapter.items():
        is_b = site_name(name) is not None
        assert torch.equal(one[name], tensor) is not is_b
        assert torch.equal(one[name], other[name]) is not is_b
    assert all(torch.equal(tensor, copy_of(adapter, "party-1")[name]) for name, tensor in one.items())
    assert site_name("base_model.model.layer.3.lora_B.weight") == "layer.3"
    assert not torch.equal(code(KEY, "a", "x", (4, 2)), code(KEY, "a", "y", (4, 2)))
