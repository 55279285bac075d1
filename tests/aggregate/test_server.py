"""Server optimisers against rounds worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedllm.aggregate.server import DEFAULTS, STEPS, StrategySettings, server_step


def scalar(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([float(value)])}


def settings_of(**values: Any) -> StrategySettings:
    return StrategySettings.model_validate(values)


def rounds(settings: StrategySettings, start: float, updates: list[float]) -> list[float]:
    state, memory, seen = scalar(start), dict[str, torch.Tensor](), []
    for update in updates:
        state, memory = server_step(state, memory, scalar(update), settings=settings)
        seen.append(state["w"].item())
    return seen


@pytest.mark.parametrize(
    ("settings", "start", "updates", "expected"),
    [
        ({"name": "FedAvg", "server_learning_rate": 2.0}, 10, [1, -0.5], [12, 11]),
        # m: 1, 0, 0.25
        (
            {"name": "FedAvgM", "server_momentum": 0.5, "server_learning_rate": 2.0},
            10,
            [1, -0.5, 0.25],
            [12, 12, 12.5],
        ),
        # m: 1, 1.5, -0.25; steps: 1 + 0.5, 1 + 0.75, -1 - 0.125
        (
            {"name": "DiLoCo", "server_momentum": 0.5, "server_learning_rate": 1.0},
            0,
            [1, 1, -1],
            [1.5, 3.25, 2.125],
        ),
        # v: 2, 6, 6.25; steps: 1 / (sqrt 2 + 1), -2 / (sqrt 6 + 1), 0.5 / 3.5
        (
            {"name": "FedAdagrad", "server_tau": 1.0, "server_learning_rate": 2.0},
            10,
            [1, -2, 0.5],
            [10.828427, 9.668836, 9.954550],
        ),
        # v: 2, 1.75, 1.75 (the sign turns); m: 1, 1, 0.5
        (
            {
                "name": "FedYogi",
                "server_tau": 1.0,
                "server_beta1": 0.5,
                "server_beta2": 0.75,
                "server_learning_rate": 1.0,
            },
            0,
            [2, 1, 0],
            [0.414214, 0.844715, 1.059965],
        ),
        # v: 1.75, 1.5625, 1.171875; m: 1, 1, 0.5
        (
            {
                "name": "FedAdam",
                "server_tau": 1.0,
                "server_beta1": 0.5,
                "server_beta2": 0.75,
                "server_learning_rate": 1.0,
            },
            0,
            [2, 1, 0],
            [0.430501, 0.874946, 1.115038],
        ),
    ],
)
def test_rounds_by_hand(settings: dict[str, Any], start: float, updates: list[float], expected: list[float]) -> None:
    assert rounds(settings_of(**settings), start, updates) == pytest.approx(expected, abs=2e-6)


def test_the_square_is_that_of_the_update_and_not_of_its_mean() -> None:
    # With beta1 = 0.9 the mean after one update of 1 is 0.1: a square of it would be a hundred times smaller.
    found = rounds(settings_of(name="FedAdam", server_beta2=0.0, server_learning_rate=1.0), 0, [1])
    assert found == pytest.approx([0.1 / 1.001], abs=1e-6)


def test_the_first_square_starts_at_tau_squared_and_no_bias_is_corrected() -> None:
    numbers = {"server_tau": 0.5, "server_beta1": 0.0, "server_beta2": 0.75, "server_learning_rate": 1.0}
    # v = 0.75 x 0.25 + 0.25 x 1 = 0.4375; from v = 0 it would be 0.25, and with a correction 1.
    found = rounds(settings_of(name="FedAdam", **numbers), 0, [1])
    assert found == pytest.approx([1 / (0.4375**0.5 + 0.5)], abs=1e-6)


@pytest.mark.parametrize("name", ["FedAdam", "FedYogi"])
def test_with_a_frozen_square_the_adaptive_ones_are_fedavg(name: str) -> None:
    tau = 0.25
    settings = settings_of(
        name=name, server_beta1=0.0, server_beta2=1 - 1e-12, server_tau=tau, server_learning_rate=1.0
    )
    memory = {"v/w": torch.tensor([(1 - tau) ** 2])}
    state, _ = server_step(scalar(2.0), memory, scalar(-0.75), settings=settings)
    assert state["w"].item() == pytest.approx(1.25, abs=1e-6)


def test_momentum_is_a_sum_and_not_an_average() -> None:
    # A constant update of 1 with beta = 0.5 tends to m = 2; an exponential average would stay at 1.
    seen = rounds(settings_of(name="FedAvgM", server_momentum=0.5), 0.0, [1.0] * 31)
    assert seen[-1] - seen[-2] == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "SCAFFOLD"])
def test_plain_strategies_add_the_mean_update_and_keep_nothing(name: str) -> None:
    state, memory = server_step(scalar(1.5), {}, scalar(-0.25), settings=settings_of(name=name))
    assert (state["w"].item(), memory) == (1.25, {})


def test_fedavgm_tends_to_fedavg_as_its_momentum_tends_to_zero() -> None:
    updates = [0.3, -1.0, 0.7]
    almost = rounds(settings_of(name="FedAvgM", server_momentum=1e-9), 1.0, updates)
    assert almost == pytest.approx(rounds(settings_of(), 1.0, updates), abs=1e-7)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_what_is_given_is_not_changed_and_what_has_no_update_stays(name: str) -> None:
    settings = settings_of(name=name)
    state = {"w": torch.tensor([1.0]), "x": torch.tensor([5.0])}
    _, memory = server_step(state, {}, {"w": torch.tensor([3.0]), "x": torch.tensor([1.0])}, settings=settings)
    before = {key: tensor.clone() for key, tensor in memory.items()}
    update = scalar(3.0)
    stepped, kept = server_step(state, memory, update, settings=settings)
    assert (state["w"].item(), update["w"].item(), stepped["x"].item()) == (1.0, 3.0, 5.0)
    assert all(torch.equal(memory[key], tensor) for key, tensor in before.items())
    assert {key: tensor.item() for key, tensor in kept.items() if key.endswith("/x")} == {
        key: tensor.item() for key, tensor in before.items() if key.endswith("/x")
    }


def test_every_strategy_has_a_step_and_its_own_defaults() -> None:
    assert STEPS.keys() == DEFAULTS.keys()
    for name, own in DEFAULTS.items():
        given = settings_of(name=name).model_dump(exclude={"name"})
        assert {key: value for key, value in given.items() if value is not None} == own
        # A run folder writes all values out, those without effect too.
        assert settings_of(name=name, **given) == settings_of(name=name)


@pytest.mark.parametrize(
    "values",
    [
        {"name": "FedAvg", "server_momentum": 0.5},
        {"name": "FedAvgM", "server_momentum": 1.0},
        {"name": "FedAvgM", "server_tau": 0.1},
        {"name": "FedAdagrad", "server_beta1": 0.9},
        {"name": "FedAdam", "server_beta2": 1.0},
        {"name": "FedAdam", "server_tau": 0.0},
        {"name": "SCAFFOLD", "proximal_mu": 0.1},
        {"name": "FedProx", "proximal_mu": 0.0},
        {"name": "FedAvg", "proximal": "decoupled"},
        {"name": "FedAvg", "proximal_mu": -1.0},
        {"name": "fedavg"},
        {"name": ["FedAvg"]},
        {"server_learning_rate": 0},
        {"server_learning_rate": float("inf")},
        {"server_learning_rate": float("nan")},
    ],
)
def test_settings_without_effect_or_sense_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        StrategySettings.model_validate(values)
