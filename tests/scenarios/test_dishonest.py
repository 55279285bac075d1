"""Two of seven parties turn their update around, a hundred times as long: the mean diverges, no rule does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from tiny import TinyFederation

from fedllm.aggregate.robust import RobustSettings
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.supervised import SupervisedTrainer

Make = Callable[..., TinyFederation]
PARTIES = ("north", "east", "south", "west", "coast", "hill", "lake")
DISHONEST = PARTIES[-2:]
PLAN: dict[str, Any] = {
    "federation.num_rounds": 4,
    "federation.eval_every": 4,
    "federation.min_parties": len(PARTIES),
    "federation.keep": "last",
    "train.local_steps": 4,
    "train.learning_rate": 0.05,
    "train.lr_scheduler_type": "constant",
}
RULES: dict[str, list[dict[str, Any]]] = {
    "FedIT": [
        {"name": "NormClipping", "clip_norm": 3.0},
        {"name": "Krum", "num_malicious": 2},
        {"name": "MultiKrum", "num_malicious": 2},
        {"name": "GeometricMedian", "num_malicious": 2},
        {"name": "FLTrust", "root_party": "north"},
    ],
    "RoLoRA": [{"name": "Median", "num_malicious": 2}, {"name": "TrimmedMean", "num_malicious": 2}],
}


class TurnedAround:
    """Trains as always; then the dishonest ones send minus a hundred times their update."""

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        before = {name: tensor.detach().clone() for name, tensor in task.model.trainable.items()}
        sums = SupervisedTrainer().train(task, optimizer)
        if task.party in DISHONEST:
            with torch.no_grad():
                for name, tensor in task.model.trainable.items():
                    tensor.copy_(before[name] - 100 * (tensor - before[name]))
        return sums


def losses_of(made: TinyFederation, **options: Any) -> list[float]:
    rows = made.run(**options).rows()
    return [r["value"] for r in rows if (r["name"], r["split"], r["party"]) == ("loss_nats", "held_out", None)]


@pytest.mark.parametrize("lora_rule", RULES)
def test_two_of_seven_turn_their_update_around_a_hundredfold(lora_rule: str, make_federation: Make) -> None:
    def job(name: str, robust: dict[str, Any]) -> TinyFederation:
        changes = PLAN | {"federation.lora_rule": lora_rule, "federation.robust": robust}
        made: TinyFederation = make_federation(name, sizes=dict.fromkeys(PARTIES, 6), job=changes)
        return made

    before, clean = losses_of(job("clean", {"name": "none"}))

    def share_learned(name: str, robust: dict[str, Any]) -> float:
        return (before - losses_of(job(name, robust), trainer=TurnedAround())[-1]) / (before - clean)

    assert before - clean > 0.5
    assert share_learned("mean", {"name": "none"}) < 0.2
    shares = {robust["name"]: share_learned(robust["name"], robust) for robust in RULES[lora_rule]}
    assert min(shares.values()) > 0.6, shares


def test_every_rule_stands_here() -> None:
    covered = {robust["name"] for rules in RULES.values() for robust in rules}
    assert {*get_args(RobustSettings.model_fields["name"].annotation)} == {"none", *covered}
