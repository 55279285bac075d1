"""Mixed ranks: who owns which slots, and a slot's mean over its owners, computed by hand."""

from __future__ import annotations

import pytest
import torch

from fedllm.aggregate.lora import sites, truncated_product
from fedllm.aggregate.slots import OWNED, Spread, num_slots, own_manifest, own_slots, slot_means, without_others
from fedllm.aggregate.total import GridSum
from fedllm.wire.payload import manifest_of

A, B = "q.lora_A.default.weight", "q.lora_B.default.weight"
EA, EB = "e.lora_embedding_A.default", "e.lora_embedding_B.default"
HEAD = "score.modules_to_save.default.weight"
Tensors = dict[str, torch.Tensor]


def adapter(generator: torch.Generator, *, rank: int = 3) -> Tensors:
    shapes = {A: (rank, 7), B: (5, rank), EA: (rank, 11), EB: (4, rank), HEAD: (2, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def summed(answers: list[tuple[Tensors, int, int]], *, size: int) -> Tensors:
    """Return the means of answers, each (its own slots, its rank, its weight), by way of the exact sum."""
    grid = GridSum()
    for number, (tensors, rank, weight) in enumerate(answers):
        grid.add(Spread(tensors, rank, size), weight=weight, counts={}, sender=str(number))
    return grid.means()


def test_a_slot_is_the_mean_of_those_who_own_it() -> None:
    # Rank 2 with weight 3, and rank 1 with weight 1: the second slot belongs to the first party alone.
    wide = {A: torch.tensor([[4.0, 8.0], [1.0, 2.0]]), B: torch.tensor([[4.0, 5.0]]), HEAD: torch.tensor([4.0])}
    narrow = {A: torch.tensor([[8.0, 0.0]]), B: torch.tensor([[0.0]]), HEAD: torch.tensor([8.0])}
    means = summed([(wide, 2, 3), (narrow, 1, 1)], size=2)
    assert means[OWNED].tolist() == [1.0, 0.75]
    # What a mean with zeros would be.
    assert means[A].tolist() == [[5.0, 6.0], [0.75, 1.5]]
    found = slot_means(means)
    assert found[A].tolist() == [[5.0, 6.0], [1.0, 2.0]]
    assert found[B].tolist() == [[3.0, 5.0]]
    assert found[HEAD].tolist() == [5.0]
    assert OWNED not in found


def test_a_slot_that_nobody_owns_does_not_move() -> None:
    one = {A: torch.ones(1, 3), B: torch.ones(2, 1)}
    found = slot_means(summed([(one, 1, 2)], size=2))
    assert found[A].tolist() == [[1.0] * 3, [0.0] * 3]
    assert found[B].tolist() == [[1.0, 0.0]] * 2


def test_with_one_rank_for_all_nothing_is_changed() -> None:
    means = adapter(torch.Generator().manual_seed(1))
    assert all(slot_means(means)[name] is means[name] for name in means)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_own_slots_are_rows_of_a_and_columns_of_b(rank: int) -> None:
    whole = adapter(torch.Generator().manual_seed(1))
    own = own_slots(whole, rank)
    assert torch.equal(own[A], whole[A][:rank]) and torch.equal(own[EA], whole[EA][:rank])
    assert torch.equal(own[B], whole[B][:, :rank]) and torch.equal(own[EB], whole[EB][:, :rank])
    assert own[HEAD] is whole[HEAD]
    assert manifest_of(own) == own_manifest(manifest_of(whole), rank)
    taken = without_others(whole, rank)
    assert manifest_of(taken) == manifest_of(whole)
    for left, right in sites(whole).values():
        assert torch.allclose(taken[left] @ taken[right], own[left] @ own[right])
        assert not taken[left][:, rank:].any() and not taken[right][rank:].any()
    assert num_slots(manifest_of(whole)) == 3


def test_what_is_spread_is_what_was_there_and_zeros() -> None:
    own = own_slots(adapter(torch.Generator().manual_seed(2)), 2)
    spread = Spread(own, 2, 3)
    assert len(spread) == len(list(spread)) == len(own) + 1
    assert spread[OWNED].tolist() == [1.0, 1.0, 0.0]
    assert torch.equal(spread[A][:2], own[A]) and not spread[A][2:].any()
    assert torch.equal(spread[B][:, :2], own[B]) and not spread[B][:, 2:].any()


def test_flexlora_s_error_is_the_tail_also_with_mixed_ranks() -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = {A: (4, 24), B: (32, 4)}
    before = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    shares, ranks = [0.5, 0.3, 0.2], [4, 2, 1]
    updates = [
        own_slots({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, rank)
        for rank in ranks
    ]
    change = truncated_product(before, updates, shares)
    found = ((before[B] + change[B]) @ (before[A] + change[A])).double()
    ideal = torch.zeros(32, 24, dtype=torch.float64)
    for share, rank, update in zip(shares, ranks, updates, strict=True):
        start = own_slots(before, rank)
        ideal += share * (start[B] + update[B]).double() @ (start[A] + update[A]).double()
    tail = torch.linalg.svdvals(ideal)[4:].norm()
    assert float(tail) > 0.1
    assert float((found - ideal).norm()) == pytest.approx(float(tail), abs=1e-5 * float(ideal.norm()))
