"""Rules that change the base: exact products, computed by hand and against dense matrices."""

from __future__ import annotations

import pytest
import torch

from fedllm.aggregate.each import combined
from fedllm.aggregate.folded import (
    FOLDED,
    check_folded,
    complete,
    folded_with,
    grown_bytes,
    pairs,
    product_norm,
    recompressed,
    residual,
    split,
    stacked,
)
from fedllm.aggregate.lora import sites
from fedllm.aggregate.robust import Update
from fedllm.aggregate.rules import LoraRule
from fedllm.aggregate.slots import own_slots
from fedllm.errors import PayloadError
from fedllm.wire.payload import manifest_of

A, B = "q.lora_A.default.weight", "q.lora_B.default.weight"
HEAD = "score.modules_to_save.default.weight"
Tensors = dict[str, torch.Tensor]


def adapter(generator: torch.Generator, *, rank: int = 3, size: tuple[int, int] = (20, 30)) -> Tensors:
    shapes = {A: (rank, size[1]), B: (size[0], rank), HEAD: (2, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def product_of(state: Tensors) -> torch.Tensor:
    """Return what the state adds to the base's weight, without the scale."""
    plain, folded = split(state)
    total = plain[B].double() @ plain[A].double()
    for _, (left, right) in pairs(folded):
        total = total + left.double() @ right.double()
    return total


def after(before: Tensors, found: object) -> Tensors:
    plain, _ = split(before)
    moved = {name: tensor + found.change.get(name, 0) for name, tensor in plain.items()}  # type: ignore[attr-defined]
    return moved | found.folded  # type: ignore[attr-defined]


def updates_of(generator: torch.Generator, weights: list[int], ranks: list[int] | None = None) -> list[Update]:
    ranks = ranks or [3] * len(weights)
    return [
        Update(str(number), weight, own_slots(adapter(generator), rank))
        for number, (weight, rank) in enumerate(zip(weights, ranks, strict=True))
    ]


def ideal_of(before: Tensors, updates: list[Update]) -> torch.Tensor:
    """Return sum p_i B_i A_i and what was folded before."""
    plain, folded = split(before)
    total = product_of({A: torch.zeros(1, 30), B: torch.zeros(20, 1)} | folded)
    for update in updates:
        rank = update.tensors[B].shape[1]
        b = plain[B][:, :rank].double() + update.tensors[B]
        a = plain[A][:rank].double() + update.tensors[A]
        total = total + update.weight / sum(one.weight for one in updates) * b @ a
    return total


@pytest.mark.parametrize("rule", ["FedEx-LoRA", "FLoRA"])
def test_two_parties_by_hand(rule: LoraRule) -> None:
    zero = {A: torch.zeros(1, 2), B: torch.zeros(1, 1)}
    # B A is [2, 0] with weight 1, and [0, 4] with weight 3; the ideal is [0.5, 3].
    updates = [
        Update("a", 1, {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[2.0]])}),
        Update("b", 3, {A: torch.tensor([[0.0, 1.0]]), B: torch.tensor([[4.0]])}),
    ]
    found = combined(rule, zero, updates)
    if rule == "FLoRA":
        assert product_of(zero | found.folded).tolist() == [pytest.approx([0.5, 3.0])]
        assert found.change == {}
        assert found.added_norm == pytest.approx((0.5**2 + 3**2) ** 0.5)
    else:
        # The means are B = 3.5 and A = [0.25, 0.75]: their product is [0.875, 2.625].
        assert found.change[B].tolist() == [[3.5]] and found.change[A].tolist() == [[0.25, 0.75]]
        assert product_of(zero | found.folded).tolist() == [pytest.approx([-0.375, 0.375])]
        assert product_of(after(zero, found)).tolist() == [pytest.approx([0.5, 3.0])]


def relative_error(rule: LoraRule, weights: list[int], ranks: list[int] | None = None) -> float:
    generator = torch.Generator().manual_seed(7)
    before, worst = adapter(generator), 0.0
    # Three rounds, so that what was folded before counts too.
    for _ in range(3):
        updates = updates_of(generator, weights, ranks)
        ideal = ideal_of(before, updates)
        if rule == "FedIT":
            plain = {name: tensor for name, tensor in before.items() if not name.startswith(FOLDED)}
            shares = [weight / sum(weights) for weight in weights]
            for update, share in zip(updates, shares, strict=True):
                plain = {name: plain[name] + share * update.tensors[name] for name in plain}
            new = plain
        else:
            new = after(before, combined(rule, before, updates))
            if rule == "FLoRA":
                new |= {A: torch.randn(3, 30, generator=generator), B: torch.zeros(20, 3)}
        worst = max(worst, float((product_of(new) - ideal).norm() / ideal.norm()))
        before = new
    return worst


@pytest.mark.parametrize("weights", [[1, 1], [5, 3, 2], [9, 1, 1, 4, 7]])
@pytest.mark.parametrize("rule", ["FedEx-LoRA", "FLoRA"])
def test_the_product_is_the_ideal_one(rule: LoraRule, weights: list[int]) -> None:
    assert relative_error(rule, weights) < 1e-6


@pytest.mark.parametrize("weights", [[1, 1], [5, 3, 2], [9, 1, 1, 4, 7]])
def test_the_mean_of_factors_is_not(weights: list[int]) -> None:
    assert relative_error("FedIT", weights) > 1e-2


def test_flora_is_exact_with_mixed_ranks() -> None:
    assert relative_error("FLoRA", [5, 3, 2], [3, 2, 1]) < 1e-6


def test_what_is_no_factor_moves_by_the_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    before, updates = adapter(generator), updates_of(generator, [1, 3])
    expected = 0.25 * updates[0].tensors[HEAD] + 0.75 * updates[1].tensors[HEAD]
    for rule in ("FedEx-LoRA", "FLoRA"):
        assert torch.allclose(combined(rule, before, updates).change[HEAD], expected, atol=1e-6)


def test_the_factors_have_no_more_columns_than_the_rank() -> None:
    generator = torch.Generator().manual_seed(2)
    before, shares = adapter(generator), [0.5, 0.3, 0.2]
    each = [update.tensors for update in updates_of(generator, [5, 3, 2])]
    for make, expected in ((residual, 6), (stacked, 9)):
        folded = folded_with({}, make(before, each, shares))
        assert [left.shape[1] for _, (left, _) in pairs(folded)] == [expected]
        for round_ in range(2, 12):
            folded = folded_with(folded, make(before, [u.tensors for u in updates_of(generator, [5, 3, 2])], shares))
            (columns,) = (left.shape[1] for _, (left, _) in pairs(folded))
            assert columns == min(20, round_ * expected)
            assert sum(t.numel() * 4 for t in folded.values()) == grown_bytes(manifest_of(before), round_ * expected)


def test_nothing_is_lost_when_columns_are_merged() -> None:
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    right = torch.randn(9, 40, generator=generator, dtype=torch.float64)
    found = recompressed(left, right)
    assert found[0].shape == (6, 6)
    assert torch.allclose(found[0] @ found[1], left @ right, atol=1e-12)
    assert product_norm({"x": (left, right)}) == pytest.approx(float((left @ right).norm()))


def test_what_is_zero_takes_no_column() -> None:
    left, right = torch.ones(4, 3, dtype=torch.float64), torch.ones(3, 5, dtype=torch.float64)
    assert recompressed(left, right)[0].shape == (4, 1)
    assert recompressed(left * 0, right)[0].shape == (4, 0)
    assert folded_with({}, {"q": (left * 0, right)}) == {}


def test_one_party_leaves_no_residual() -> None:
    generator = torch.Generator().manual_seed(4)
    before, updates = adapter(generator), updates_of(generator, [3])
    found = combined("FedEx-LoRA", before, updates)
    assert found.folded == {}
    assert torch.allclose(product_of(after(before, found)), ideal_of(before, updates), atol=1e-5)


@pytest.mark.parametrize("own", [True, False])
def test_one_adapter_of_a_higher_rank_holds_it_all(own: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    state, other = adapter(generator), adapter(generator, size=(8, 9))
    state |= {name.replace("q.", "v."): tensor for name, tensor in other.items() if name != HEAD}
    if not own:
        state |= {name: torch.zeros_like(state[name]) for name in state if "lora_B" in name}
    folded = folded_with({}, stacked(state, [adapter_like(state, generator) for _ in range(2)], [0.5, 0.5]))
    # A site without anything beside it gets zeros.
    folded = {name: tensor for name, tensor in folded.items() if "/v." not in name}
    found = complete(state | folded)
    assert set(found) == set(state)
    assert {found[left].shape[1] for left, _ in sites(found).values()} == {9 if own else 6}
    assert torch.allclose(found[B] @ found[A], product_of({A: state[A], B: state[B]} | folded).float(), atol=1e-5)
    v_a, v_b = A.replace("q.", "v."), B.replace("q.", "v.")
    assert torch.allclose(found[v_b] @ found[v_a], state[v_b] @ state[v_a], atol=1e-6)
    assert found[HEAD] is state[HEAD]


def adapter_like(state: Tensors, generator: torch.Generator) -> Tensors:
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def test_a_state_without_it_is_complete_as_it_is() -> None:
    state = adapter(torch.Generator().manual_seed(6))
    assert complete(state) == state


@pytest.mark.parametrize("wrong", ["site", "half", "shape", "columns"])
def test_what_does_not_fit_is_refused(wrong: str) -> None:
    manifest = manifest_of(adapter(torch.Generator().manual_seed(1)))
    good = {f"{FOLDED}q.left": torch.zeros(20, 5), f"{FOLDED}q.right": torch.zeros(5, 30)}
    check_folded(good, manifest, sender="server")
    check_folded({}, manifest, sender="server")
    bad = {
        "site": {name.replace("q.", "k."): tensor for name, tensor in good.items()},
        "half": {f"{FOLDED}q.right": torch.zeros(5, 30)},
        "shape": good | {f"{FOLDED}q.right": torch.zeros(5, 31)},
        "columns": {f"{FOLDED}q.left": torch.zeros(20, 21), f"{FOLDED}q.right": torch.zeros(21, 30)},
    }
    with pytest.raises(PayloadError, match="PAYLOAD_REFUSED"):
        check_folded(bad[wrong], manifest, sender="server")
