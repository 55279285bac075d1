"""A trainer that leaves out what the job adds to each step is told so, and one that calls it trains as it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import TinyFederation

from fedllm.errors import RunFailed
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.supervised import SupervisedTrainer

Make = Callable[..., TinyFederation]
SGD: dict[str, Any] = {"train.optim": "sgd", "train.learning_rate": 0.5, "train.lr_scheduler_type": "constant"}
PLANS: dict[str, dict[str, Any]] = {
    "FedProx": {"federation.strategy": {"name": "FedProx"}},
    "SCAFFOLD": SGD | {"federation.strategy": {"name": "SCAFFOLD"}},
}


class Deaf:
    """Trains, and leaves out the corrections from some one on."""

    def __init__(self, calls: int = 0) -> None:
        self._calls = calls

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        return SupervisedTrainer().train(replace(task, corrections=task.corrections[: self._calls]), optimizer)


@pytest.mark.parametrize("plan", PLANS)
def test_a_trainer_that_never_calls_the_corrections_fails_its_party(plan: str, make_federation: Make) -> None:
    federation = make_federation(job=PLANS[plan])
    with pytest.raises(RunFailed) as caught:
        federation.run(trainer=Deaf())
    for party in ("north", "east", "south"):
        assert f"{party}: BAD_COMBINATION" in caught.value.what


def test_one_that_calls_them_and_one_that_is_given_none_are_let_alone(make_federation: Make) -> None:
    plain = make_federation("plain").run(trainer=Deaf())
    assert plain.adapter_sha256 == make_federation("default").run().adapter_sha256
    pulled = make_federation("pulled", job=PLANS["FedProx"]).run(trainer=Deaf(calls=1))
    assert pulled.adapter_sha256 == make_federation("by default", job=PLANS["FedProx"]).run().adapter_sha256
