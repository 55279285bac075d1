"""Rules for LoRA's factors: what moves when, exact products, and the drift meter against the dense matrices."""

from __future__ import annotations

import math

import pytest
import torch

from fedllm.aggregate.lora import answered, drift, moving, sites, sketch, travelling, truncated_product
from fedllm.aggregate.rules import LoraRule

A, B = "base.q_proj.lora_A.default.weight", "base.q_proj.lora_B.default.weight"
EA, EB = "base.embed.lora_embedding_A.default", "base.embed.lora_embedding_B.default"
HEAD = "base.score.modules_to_save.default.weight"
NAMES = [A, B, EA, EB, HEAD]
Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("rule", "number", "expected"),
    [
        ("FedIT", 1, NAMES),
        ("FedIT", 2, NAMES),
        # On embeddings B is the random factor.
        ("FFA-LoRA", 1, [B, EA, HEAD]),
        ("FFA-LoRA", 2, [B, EA, HEAD]),
        ("RoLoRA", 1, [B, EA, HEAD]),
        ("RoLoRA", 2, [A, EB, HEAD]),
        ("FedSA-LoRA", 1, NAMES),
        ("FLoRA", 2, NAMES),
    ],
)
def test_what_moves(rule: LoraRule, number: int, expected: list[str]) -> None:
    assert moving(rule, NAMES, number) == expected


def test_what_never_moves_need_not_travel() -> None:
    assert travelling("FFA-LoRA", NAMES) == [B, EA, HEAD]
    assert travelling("RoLoRA", NAMES) == travelling("FedIT", NAMES) == travelling("FedEx-LoRA", NAMES) == NAMES
    # What stays at its party, and what is drawn afresh.
    assert travelling("FedSA-LoRA", NAMES) == [A, EB, HEAD]
    assert travelling("FLoRA", NAMES) == [HEAD]


def test_what_an_answer_brings() -> None:
    assert answered("FedSA-LoRA", NAMES, 1) == answered("FedSA-LoRA", NAMES, 2) == [A, EB, HEAD]
    assert answered("FLoRA", NAMES, 1) == answered("FedIT", NAMES, 1) == NAMES
    assert answered("RoLoRA", NAMES, 2) == [A, EB, HEAD]


def test_sites_are_pairs_of_factors() -> None:
    assert sites([*NAMES, "base.k_proj.lora_A.default.weight"]) == {"base.q_proj": (B, A), "base.embed": (EB, EA)}


def random_adapter(generator: torch.Generator, *, rank: int = 3) -> Tensors:
    shapes = {A: (rank, 7), B: (5, rank), EA: (rank, 11), EB: (4, rank), HEAD: (2, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def weighted(adapters: list[Tensors], weights: list[float]) -> Tensors:
    return {name: sum(w * one[name] for w, one in zip(weights, adapters, strict=True)) for name in adapters[0]}  # type: ignore[misc]


def products(adapter: Tensors) -> Tensors:
    return {site: adapter[left] @ adapter[right] for site, (left, right) in sites(adapter).items()}


def after_a_round(rule: LoraRule, number: int) -> tuple[list[Tensors], list[float], Tensors]:
    """Return parties' adapters after a round from a common start, their weights, and the mean of what moved."""
    generator = torch.Generator().manual_seed(3)
    start, weights = random_adapter(generator), [0.5, 0.3, 0.2]
    moved = moving(rule, start, number)
    parties = []
    for _ in weights:
        change = random_adapter(generator)
        parties.append(start | {name: start[name] + change[name] for name in moved})
    return parties, weights, weighted(parties, weights)


@pytest.mark.parametrize(("rule", "number"), [("FFA-LoRA", 1), ("RoLoRA", 1), ("RoLoRA", 2)])
def test_with_one_factor_fixed_the_mean_of_products_is_the_product_of_means(rule: LoraRule, number: int) -> None:
    parties, weights, mean = after_a_round(rule, number)
    ideal = weighted([products(party) for party in parties], weights)
    for site, product in products(mean).items():
        assert (product - ideal[site]).norm() / ideal[site].norm() < 1e-6


def test_averaging_both_factors_is_not_exact() -> None:
    parties, weights, mean = after_a_round("FedIT", 1)
    ideal = weighted([products(party) for party in parties], weights)
    assert all((product - ideal[site]).norm() / ideal[site].norm() > 0.1 for site, product in products(mean).items())


def large_adapter(generator: torch.Generator, rows: int = 32) -> Tensors:
    shapes = {"A": (4, 24), "B": (rows, 4)}
    return {
        f"layers.{site}.lora_{factor}.default.weight": torch.randn(shape, generator=generator)
        for site in range(16)
        for factor, shape in shapes.items()
    }


@pytest.mark.parametrize("rows", [32, 200])
def test_the_meter_says_what_the_dense_matrices_say(rows: int) -> None:
    """Of factors with many rows a sketch has 32 numbers a site."""
    generator = torch.Generator().manual_seed(5)
    before, weights = large_adapter(generator, rows), [0.5, 0.3, 0.2]
    changes = [large_adapter(generator, rows) for _ in weights]
    assert {tensor.numel() for tensor in sketch(before, seed=1, number=1).values()} == {32}
    for size in (0.1, 0.3, 1.0):
        parties = [{name: before[name] + size * change[name] for name in before} for change in changes]
        mean = weighted(parties, weights)
        ideal, now, was = weighted([products(party) for party in parties], weights), products(mean), products(before)
        bias = sum(float((ideal[site] - now[site]).square().sum()) for site in ideal)
        truth = math.sqrt(bias / sum(float((ideal[site] - was[site]).square().sum()) for site in ideal))
        found = []
        for number in range(1, 31):
            sketches = weighted([sketch(party, seed=1, number=number) for party in parties], weights)
            update = {name: mean[name] - before[name] for name in before}
            value = drift(sketches, before, update, seed=1, number=number)
            assert value == pytest.approx(truth, rel=0.5)
            found.append(value)
        assert sum(found) / len(found) == pytest.approx(truth, rel=0.07)


def test_the_meter_sees_no_bias_where_one_factor_is_fixed() -> None:
    parties, weights, mean = after_a_round("RoLoRA", 1)
    before = {name: parties[0][name] * 0.5 for name in mean}
    sketches = weighted([sketch(party, seed=1, number=1) for party in parties], weights)
    update = {name: mean[name] - before[name] for name in before}
    value = drift(sketches, before, update, seed=1, number=1)
    assert value is not None
    assert value < 1e-6


def test_all_parties_draw_the_same_probe_and_each_round_another() -> None:
    adapter = random_adapter(torch.Generator().manual_seed(1))
    one = sketch(adapter, seed=1, number=1)
    assert all(torch.equal(tensor, sketch(adapter, seed=1, number=1)[site]) for site, tensor in one.items())
    assert not any(torch.equal(tensor, sketch(adapter, seed=1, number=2)[site]) for site, tensor in one.items())


def test_where_nothing_changed_there_is_nothing_to_say() -> None:
    adapter = random_adapter(torch.Generator().manual_seed(1))
    nothing = {name: torch.zeros_like(tensor) for name, tensor in adapter.items()}
    assert drift(sketch(adapter, seed=1, number=1), adapter, nothing, seed=1, number=1) is None


def ideal_product(before: Tensors, updates: list[Tensors], shares: list[float]) -> dict[str, torch.Tensor]:
    after = [{name: (before[name] + update[name]).double() for name in before} for update in updates]
    return weighted([products(one) for one in after], shares)


@pytest.mark.parametrize("parties", [1, 2, 5])
def test_flexlora_s_error_is_the_tail_of_the_singular_values(parties: int) -> None:
    generator = torch.Generator().manual_seed(parties)
    before = large_adapter(generator)
    updates = [large_adapter(generator) for _ in range(parties)]
    shares = [(number + 1) / (parties * (parties + 1) / 2) for number in range(parties)]
    change = truncated_product(before, updates, shares)
    found = products({name: (before[name] + change[name]).double() for name in before})
    for site, wanted in ideal_product(before, updates, shares).items():
        tail = torch.linalg.svdvals(wanted)[4:].norm()
        assert float((found[site] - wanted).norm()) == pytest.approx(float(tail), abs=1e-5 * float(wanted.norm()))


def test_flexlora_is_nearer_to_the_ideal_than_the_mean_of_factors() -> None:
    generator = torch.Generator().manual_seed(9)
    before = large_adapter(generator)
    updates, shares = [large_adapter(generator) for _ in range(4)], [0.25] * 4
    change = truncated_product(before, updates, shares)
    mean = {name: before[name] + sum(update[name] for update in updates) / 4 for name in before}
    ideal, flex = ideal_product(before, updates, shares), products({n: before[n] + change[n] for n in before})
    averaged = products(mean)
    assert all((flex[site] - ideal[site]).norm() < (averaged[site] - ideal[site]).norm() for site in ideal)


def test_flexlora_on_a_site_smaller_than_its_rank() -> None:
    name_a, name_b = "tiny.lora_A.default.weight", "tiny.lora_B.default.weight"
    generator = torch.Generator().manual_seed(1)
    before = {name_a: torch.randn(4, 3, generator=generator), name_b: torch.randn(2, 4, generator=generator)}
    update = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in before.items()}
    change = truncated_product(before, [update], [1.0])
    after = {name: before[name] + change[name] for name in before}
    expected = (before[name_b] + update[name_b]) @ (before[name_a] + update[name_a])
    assert torch.allclose(after[name_b] @ after[name_a], expected, atol=1e-5)


def test_adaloras_factors_are_no_pair() -> None:
    names = [f"base.q_proj.lora_{factor}.default.weight" for factor in "ABE"]
    assert sites(names) == {}
    assert len(sites(names[:2])) == 1
