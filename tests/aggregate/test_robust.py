"""Rules that look at each update: by hand, against brute force, and against parties that flip their signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedllm.aggregate import robust
from fedllm.aggregate.lora import sites
from fedllm.aggregate.robust import (
    RobustSettings,
    Update,
    gram,
    krum_scores,
    robust_mean,
    squared_distances,
    weighted_sum,
)

Tensors = dict[str, torch.Tensor]
A, B, HEAD = "m.q.lora_A.default.weight", "m.q.lora_B.default.weight", "m.score.weight"


def settings_of(**values: Any) -> RobustSettings:
    return RobustSettings.model_validate(values)


def points(*rows: list[float], weights: list[int] | None = None) -> list[Update]:
    weights = weights or [1] * len(rows)
    return [
        Update(f"p{i}", weight, {"w": torch.tensor(row)})
        for i, (row, weight) in enumerate(zip(rows, weights, strict=True))
    ]


ORIGIN = {"w": torch.zeros(2)}


def mean_of(updates: list[Update], **settings: Any) -> list[float]:
    found: list[float] = robust_mean(ORIGIN, updates, settings_of(**settings))["w"].tolist()
    return found


def test_the_median_is_taken_by_coordinate() -> None:
    updates = points([1.0, 9.0], [2.0, 7.0], [100.0, 8.0])
    assert mean_of(updates, name="Median", num_malicious=1) == [2.0, 8.0]
    # Of an even number it is the mean of the two in the middle.
    assert mean_of(points([1.0, 1.0], [2.0, 2.0], [4.0, 4.0], [9.0, 9.0]), name="Median", num_malicious=1) == [3.0, 3.0]


def test_the_trimmed_mean_drops_as_many_at_each_end() -> None:
    updates = points([-50.0, 0.0], [1.0, 1.0], [2.0, 5.0], [3.0, 3.0], [90.0, 99.0])
    assert mean_of(updates, name="TrimmedMean", num_malicious=1) == [2.0, 3.0]
    assert mean_of(updates, name="TrimmedMean", num_malicious=2) == [2.0, 3.0]


def test_krum_by_hand() -> None:
    # n = 5, f = 1: the two nearest count. On a line at 0, 1, 2, 4 and 100.
    updates = points([0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [100.0, 0.0])
    inner = gram(ORIGIN, updates)
    assert krum_scores(inner, 1).tolist() == [1 + 4, 1 + 1, 1 + 4, 4 + 9, 96**2 + 98**2]
    assert mean_of(updates, name="Krum", num_malicious=1) == [1.0, 0.0]
    # The four of lowest score.
    assert mean_of(updates, name="MultiKrum", num_malicious=1) == [1.75, 0.0]


def test_the_geometric_median_minimises_the_sum_of_distances() -> None:
    updates = points([0.0, 0.0], [4.0, 0.0], [1.0, 3.0], [50.0, 80.0], weights=[2, 1, 1, 1])
    found = torch.tensor(mean_of(updates, name="GeometricMedian", num_malicious=1), dtype=torch.float64)

    def cost(at: torch.Tensor) -> float:
        return sum(u.weight * float((u.tensors["w"].double() - at).norm()) for u in updates)

    around = [found + torch.tensor(step) for step in ([0.01, 0.0], [-0.01, 0.0], [0.0, 0.01], [0.0, -0.01])]
    assert all(cost(found) <= cost(at) + 1e-6 for at in around)
    # Of equal points it is that point, and nothing is divided by 0.
    assert mean_of(points([3.0, 1.0], [3.0, 1.0], [3.0, 1.0]), name="GeometricMedian", num_malicious=1) == [3.0, 1.0]


def test_norm_clipping_by_hand() -> None:
    # Norms 5 and 1, limit 2: the first is multiplied by 0.4; weights 3 and 1.
    found = mean_of(points([3.0, 4.0], [1.0, 0.0], weights=[3, 1]), name="NormClipping", clip_norm=2.0)
    assert found == pytest.approx([0.75 * 1.2 + 0.25, 0.75 * 1.6])
    assert mean_of(points([0.0, 0.0], [0.0, 0.0]), name="NormClipping", clip_norm=2.0) == [0.0, 0.0]
    # Without a bound the median norm is one: here 1, so that (300, 400) counts as (0.6, 0.8).
    assert mean_of(points([300.0, 400.0], [1.0, 0.0], [0.0, 0.5]), name="NormClipping") == pytest.approx(
        [1.6 / 3, 1.3 / 3]
    )
    assert mean_of(points([0.0, 0.0], [0.0, 0.0]), name="NormClipping") == [0.0, 0.0]


def test_fltrust_by_hand() -> None:
    # Root (2, 0). Cosines: 1, 0.6, -1 (counts as 0). Scaled to the root's norm: (2, 0), (1.2, 1.6).
    updates = points([2.0, 0.0], [3.0, 4.0], [-9.0, 0.0])
    found = mean_of(updates, name="FLTrust", root_party="p0")
    assert found == pytest.approx([(2 + 0.6 * 1.2) / 1.6, 0.6 * 1.6 / 1.6])


def random_state(generator: torch.Generator, *, scale: float = 1.0) -> Tensors:
    shapes = {A: (3, 7), B: (5, 3), HEAD: (2, 4)}
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def dense(before: Tensors, update: Tensors) -> torch.Tensor:
    """Return the effective update as one vector, from the dense products."""
    after = {name: before[name].double() + update.get(name, torch.zeros(())).double() for name in before}
    parts = [
        (after[left] @ after[right] - before[left].double() @ before[right].double()).reshape(-1)
        for left, right in sites(before).values()
    ]
    return torch.cat([*parts, (after[HEAD] - before[HEAD].double()).reshape(-1)])


@pytest.mark.parametrize("moved", [{B, HEAD}, {A, HEAD}])
def test_inner_products_are_those_of_the_dense_effective_updates(moved: set[str]) -> None:
    generator = torch.Generator().manual_seed(2)
    before = random_state(generator)
    states = [random_state(generator, scale=0.01) for _ in range(4)]
    updates = [Update(f"p{i}", 1, {n: t for n, t in state.items() if n in moved}) for i, state in enumerate(states)]
    vectors = torch.stack([dense(before, dict(update.tensors)) for update in updates])
    inner = gram(before, updates)
    assert (inner - vectors @ vectors.T).abs().max() < 1e-12 + 1e-9 * float(inner.abs().max())
    assert (squared_distances(inner) - torch.cdist(vectors, vectors).square()).abs().max() < 1e-9


def test_where_both_factors_move_half_is_the_effective_update_and_half_are_the_factors() -> None:
    generator = torch.Generator().manual_seed(2)
    before = random_state(generator)
    states = [random_state(generator, scale=0.1) for _ in range(5)]
    after = [{name: before[name].double() + state[name].double() for name in (A, B)} for state in states]
    size_a, size_b = (np.median([float(state[name].norm()) ** 2 / 3 for state in after]) for name in (A, B))
    effective = torch.stack([dense(before, state) for state in states])
    head = torch.stack([state[HEAD].double().reshape(-1) for state in states])
    factors = [(size_b**0.5, A), (size_a**0.5, B)]
    raw = torch.cat([scale * torch.stack([u[n].double().reshape(-1) for u in states]) for scale, n in factors], dim=1)
    expected = (effective @ effective.T + raw @ raw.T + head @ head.T) / 2
    inner = gram(before, [Update(f"p{i}", 1, state) for i, state in enumerate(states)])
    assert (inner - expected).abs().max() < 1e-6 * float(expected.abs().max())


def other_gauge(before: Tensors, update: Tensors, factor: float) -> Tensors:
    """Return an update that ends at the same product, split another way."""
    return {
        A: (before[A] + update[A]) / factor - before[A],
        B: (before[B] + update[B]) * factor - before[B],
        HEAD: update[HEAD],
    }


def effective_alone(before: Tensors, updates: Sequence[Update]) -> torch.Tensor:
    vectors = torch.stack([dense(before, dict(update.tensors)) for update in updates])
    return vectors @ vectors.T


@pytest.mark.parametrize("defence", [True, False])
@pytest.mark.parametrize("name", ["NormClipping", "Krum", "MultiKrum", "GeometricMedian", "FLTrust"])
def test_honest_products_in_another_split_do_not_ruin_the_mean_of_factors(
    name: str, defence: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their products two parties of ten look honest. With distances of products alone the attack works."""
    generator = torch.Generator().manual_seed(5)
    before = random_state(generator)
    common = random_state(generator, scale=0.05)
    honest = [{n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in common.items()} for _ in range(10)]
    # Krum takes one update, which may be an honest one by luck.
    states = [other_gauge(before, state, 1000.0) if i < 2 else state for i, state in enumerate(honest)]
    updates = [Update(f"p{i}", 1, state) for i, state in enumerate(states)]
    if not defence:
        monkeypatch.setattr(robust, "gram", effective_alone)
    own: dict[str, Any] = {"num_malicious": 2}
    own = {"NormClipping": {"clip_norm": 1.0}, "FLTrust": {"root_party": "p9"}}.get(name, own)
    found = robust_mean(before, updates, settings_of(name=name, **own))
    ideal = sum(dense(before, state) for state in honest) / len(honest)
    error = float((dense(before, found) - ideal).norm() / ideal.norm())
    if defence:
        assert error < 0.8
    elif name != "Krum":
        assert error > 20


def test_distances_do_not_depend_on_how_a_product_is_split() -> None:
    """B / 100 and 100 A are the same model; distances of raw factors would be ruled by A."""
    generator = torch.Generator().manual_seed(4)
    before = random_state(generator)
    plain = [random_state(generator, scale=0.1) for _ in range(5)]

    def other_split(tensors: Tensors) -> Tensors:
        return {A: 100 * tensors[A], B: tensors[B] / 100, HEAD: tensors[HEAD]}

    one = gram(before, [Update("p", 1, state) for state in plain])
    other = gram(other_split(before), [Update("p", 1, other_split(state)) for state in plain])
    assert (one - other).abs().max() < 1e-5 * float(one.abs().max())
    raw = torch.stack([torch.cat([state[n].reshape(-1) for n in (A, B)]) for state in plain])
    split = torch.stack([torch.cat([other_split(state)[n].reshape(-1) for n in (A, B)]) for state in plain])
    assert not torch.allclose(raw @ raw.T, split @ split.T, rtol=0.5)


RULES: list[dict[str, Any]] = [
    {"name": "Median", "num_malicious": 2},
    {"name": "TrimmedMean", "num_malicious": 2},
    {"name": "Krum", "num_malicious": 2},
    {"name": "MultiKrum", "num_malicious": 2},
    {"name": "GeometricMedian", "num_malicious": 2},
    {"name": "NormClipping", "clip_norm": 0.2},
    {"name": "NormClipping"},
    {"name": "FLTrust", "root_party": "p0"},
]


def descend(num_malicious: int, settings: dict[str, Any] | None) -> float:
    """Return the honest parties' mean loss after 60 rounds of a quadratic in 8 dimensions."""
    generator = torch.Generator().manual_seed(0)
    goals = [torch.ones(8) + 0.1 * torch.randn(8, generator=generator) for _ in range(10)]
    state = {"w": torch.zeros(8)}
    for _ in range(60):
        updates = []
        for index, goal in enumerate(goals):
            change = 0.2 * (goal - state["w"])
            is_bad = index >= len(goals) - num_malicious
            updates.append(Update(f"p{index}", 1, {"w": -100 * change if is_bad else change}))
        if settings is None:
            mean = weighted_sum(updates, [0.1] * 10)
        else:
            mean = robust_mean(state, updates, settings_of(**settings))
        state = {"w": state["w"] + mean["w"]}
    honest = goals[: len(goals) - 2]
    return sum(float((goal - state["w"]).square().sum()) for goal in honest) / len(honest)


def test_two_of_ten_flipped_signs_ruin_the_mean() -> None:
    clean, attacked = descend(0, None), descend(2, None)
    assert attacked > 1e6 * clean or attacked != attacked


@pytest.mark.parametrize("settings", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
def test_every_rule_bears_two_of_ten_flipped_signs(settings: dict[str, Any]) -> None:
    # FLTrust ends where its root party would alone: nearer than that no other update is trusted.
    assert descend(2, settings) < (3 if settings["name"] == "FLTrust" else 2) * descend(0, None)


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, 1),
        ({"name": "Median", "num_malicious": 1}, 3),
        ({"name": "TrimmedMean", "num_malicious": 2}, 5),
        ({"name": "Krum", "num_malicious": 1}, 5),
        ({"name": "MultiKrum", "num_malicious": 3}, 9),
        ({"name": "GeometricMedian", "num_malicious": 2}, 5),
        ({"name": "FLTrust", "root_party": "north"}, 2),
    ],
)
def test_how_many_answers_a_rule_needs(settings: dict[str, Any], least: int) -> None:
    assert settings_of(**settings).least_parties() == least


@pytest.mark.parametrize(
    "values",
    [
        {"name": "Krum"},
        {"name": "FLTrust"},
        {"num_malicious": 1},
        {"name": "Krum", "num_malicious": 1, "clip_norm": 1.0},
        {"name": "NormClipping", "clip_norm": 0.0},
        {"name": "Median", "num_malicious": 0},
        {"name": "median", "num_malicious": 1},
    ],
)
def test_settings_without_effect_or_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings_of(**values)
