"""Server optimisers against rounds worked out by hand."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from fedllm.aggregate.server import StrategySettings, fedavgm


def scalar(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([value])}


def test_three_rounds_of_fedavgm_by_hand() -> None:
    # beta = 0.5, eta = 2; updates 1, -0.5, 0.25 from theta = 10:
    # m: 1, 0, 0.25; theta: 12, 12, 12.5
    settings = StrategySettings(name="FedAvgM", server_momentum=0.5, server_learning_rate=2.0)
    state, momentum = scalar(10.0), {}
    seen = []
    for update in (1.0, -0.5, 0.25):
        state, momentum = fedavgm(state, momentum, scalar(update), settings=settings)
        seen.append((momentum["w"].item(), state["w"].item()))
    assert seen == [(1.0, 12.0), (0.0, 12.0), (0.25, 12.5)]


def test_momentum_is_a_sum_and_not_an_average() -> None:
    # A constant update of 1 with beta = 0.5 tends to m = 2; an exponential average would stay at 1.
    settings = StrategySettings(name="FedAvgM", server_momentum=0.5)
    state, momentum = scalar(0.0), {}
    for _ in range(30):
        state, momentum = fedavgm(state, momentum, scalar(1.0), settings=settings)
    assert momentum["w"].item() == pytest.approx(2.0)


def test_fedavg_adds_the_mean_update_and_keeps_nothing() -> None:
    state, momentum = fedavgm(scalar(1.5), {}, scalar(-0.25), settings=StrategySettings())
    assert state["w"].item() == 1.25
    assert momentum == {}


def test_fedavgm_tends_to_fedavg_as_its_momentum_tends_to_zero() -> None:
    updates = [0.3, -1.0, 0.7]
    ends = []
    for settings in (StrategySettings(), StrategySettings(name="FedAvgM", server_momentum=1e-9)):
        state, momentum = scalar(1.0), {}
        for update in updates:
            state, momentum = fedavgm(state, momentum, scalar(update), settings=settings)
        ends.append(state["w"].item())
    assert ends[0] == pytest.approx(ends[1], abs=1e-7)


def test_what_is_given_is_not_changed() -> None:
    state, momentum, update = scalar(1.0), scalar(2.0), scalar(3.0)
    fedavgm(state, momentum, update, settings=StrategySettings(name="FedAvgM", server_momentum=0.9))
    assert (state["w"].item(), momentum["w"].item(), update["w"].item()) == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    "values",
    [
        {"name": "FedAvg", "server_momentum": 0.5},
        {"name": "FedAvgM"},
        {"name": "FedAvgM", "server_momentum": 1.0},
        {"server_learning_rate": 0},
        {"server_learning_rate": float("inf")},
        {"server_learning_rate": float("nan")},
    ],
)
def test_settings_without_effect_or_sense_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        StrategySettings.model_validate(values)
