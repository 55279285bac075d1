"""Parties of different rank in one run: what they train, what they send, and what cannot be combined with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rounds import adapters, broken_and_resumed, bytes_up, check_the_plan
from tiny import TinyFederation

from fedllm.aggregate.slots import slot_axis
from fedllm.errors import ConfigError
from fedllm.privacy.settings import PrivacySettings
from fedllm.runtime.plan import rehearse
from fedllm.runtime.validate import validate
from fedllm.scenarios.fedhomollm_clashes import clashes
from fedllm.scenarios.fedhomollm_settings import Settings
from fedllm.train.base import TrainSums
from fedllm.train.settings import TrainSettings
from fedllm.train.supervised import SupervisedTrainer

Make = Callable[..., TinyFederation]
PLAN: dict[str, Any] = {
    "federation.num_rounds": 3,
    "federation.keep": "last",
    "federation.ranks": {"north": 1, "south": 3},
    "peft.r": 4,
}
SGD: dict[str, Any] = {"train.optim": "sgd", "train.learning_rate": 0.5, "train.lr_scheduler_type": "constant"}
CASES: dict[str, dict[str, Any]] = {
    "FedIT": PLAN,
    "FedAvgM": PLAN | {"federation.strategy": {"name": "FedAvgM"}},
    "FedProx": PLAN | {"federation.strategy": {"name": "FedProx", "proximal": "decoupled"}},
    "FFA-LoRA": PLAN | {"federation.lora_rule": "FFA-LoRA"},
    "RoLoRA": PLAN | {"federation.lora_rule": "RoLoRA"},
    "FlexLoRA": PLAN | {"federation.lora_rule": "FlexLoRA", "train.optimizer_state": "reset"},
    "int8": PLAN | {"federation.codec": {"name": "int8", "error_feedback": True}},
    "RandomK, part": PLAN | {"federation.codec": {"name": "RandomK", "density": 0.5}, "federation.fraction_train": 0.6},
    "rslora": PLAN | {"peft.use_rslora": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_resumed_ends_as_the_unbroken_one(case: str, make_federation: Make) -> None:
    federation = make_federation(job=CASES[case])
    expected = federation.run("unbroken")
    result = broken_and_resumed(federation, after=1)
    assert (result.status, result.adapter_sha256) == ("SUCCESS", expected.adapter_sha256)


@pytest.mark.parametrize("case", ["FedIT", "RoLoRA", "int8", "FlexLoRA"])
def test_the_plan_foretells_the_bytes_of_each_party(case: str, make_federation: Make) -> None:
    check_the_plan(make_federation(job=CASES[case] | {"federation.num_rounds": 6}))


def test_a_party_that_is_not_drawn_in_the_rehearsal_is_foretold_by_its_rank(make_federation: Make) -> None:
    plan = PLAN | {"federation.fraction_train": 0.3, "federation.min_parties": 1, "peft.r": 32}
    federation = make_federation(job=plan, party={"limits.min_parties": 1})
    foretold = rehearse(federation.job(), validate(federation.job(), federation.parties()))
    most = {party: upload.per_round for party, upload in foretold.most_up.items()}
    # The first party also sends the first adapter, once.
    assert 0.05 < most["south"] / most["east"] < 0.25


class Looking:
    """Trains, and keeps what the model held before, its gradients' owners, and what it held after."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], list[dict[str, torch.Tensor]]] = {}
        self.gradients: dict[str, float] = {}

    def train(self, task: Any, optimizer: torch.optim.Optimizer) -> TrainSums:
        before = task.model.read()
        task.corrections.append(lambda rate: self._look(task))
        sums = SupervisedTrainer().train(task, optimizer)
        self.seen[task.party, task.round] = [before, task.model.read()]
        return sums

    def _look(self, task: Any) -> None:
        rank = {"north": 1, "south": 3}.get(task.party, 4)
        for name, parameter in task.model.trainable.items():
            if parameter.grad is not None:
                others = beyond(name, parameter.grad, rank)
                self.gradients[task.party] = max(self.gradients.get(task.party, 0.0), float(others.abs().max()))


def beyond(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the slots that a party of this rank does not own; a zero if there are none."""
    axis = slot_axis(name)
    assert axis is not None
    rest = tensor.narrow(axis, rank, tensor.shape[axis] - rank)
    return rest if rest.numel() else torch.zeros(1)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_slots_that_a_party_does_not_own_stay_zero_by_themselves(optim: str, make_federation: Make) -> None:
    trainer = Looking()
    plan = PLAN | {"train.optim": optim, "train.weight_decay": 0.1, "train.local_steps": 4}
    make_federation(job=plan).run(trainer=trainer)
    assert trainer.gradients == {"north": 0.0, "east": 0.0, "south": 0.0}
    for party, rank in {"north": 1, "south": 3}.items():
        for number in (1, 2, 3):
            before, after = trainer.seen[party, number]
            for name in before:
                assert not beyond(name, before[name], rank).any() and not beyond(name, after[name], rank).any()
            assert any(not torch.equal(before[name], after[name]) for name in before)
    # A party of full rank does train them.
    assert any(beyond(name, tensor, 3).any() for name, tensor in trainer.seen["east", 3][1].items())


def test_a_slot_moves_by_the_mean_of_its_owners(make_federation: Make) -> None:
    trainer = Looking()
    result = make_federation(job=PLAN | {"federation.num_rounds": 1}).run(trainer=trainer)
    found = adapters(result)
    weights, ranks = {"north": 6, "east": 9, "south": 4}, {"north": 1, "east": 4, "south": 3}
    for name in found[1]:
        axis = slot_axis(name)
        assert axis is not None
        for slot in range(4):
            owners = [party for party, rank in ranks.items() if rank > slot]
            mean = sum(weights[party] * trainer.seen[party, 1][1][name].select(axis, slot) for party in owners)
            expected = mean / sum(weights[party] for party in owners)
            assert torch.allclose(found[1][name].select(axis, slot), expected, atol=1e-6)


def test_a_party_sends_its_slots_alone(make_federation: Make) -> None:
    plan = PLAN | {"peft.r": 64, "federation.drift_meter": False}
    full = bytes_up(make_federation("full", job=plan | {"federation.ranks": {}}).run())
    mixed = bytes_up(make_federation("mixed", job=plan | {"federation.ranks": {"north": 16, "south": 32}}).run())
    assert mixed["east"] == pytest.approx(full["east"], rel=0.01)
    assert mixed["south"] == pytest.approx(full["south"] / 2, rel=0.1)
    assert mixed["north"] == pytest.approx(full["north"] / 4, rel=0.15)


def test_ranks_that_are_all_full_change_nothing(make_federation: Make) -> None:
    plan = PLAN | {"federation.drift_meter": False}
    plain = make_federation("plain", job=plan | {"federation.ranks": {}}).run()
    named = make_federation("named", job=plan | {"federation.ranks": {"north": 4}}).run()
    assert named.adapter_sha256 == plain.adapter_sha256
    mixed = make_federation("mixed", job=plan).run()
    assert mixed.adapter_sha256 != plain.adapter_sha256


def test_the_drift_is_not_measured_with_mixed_ranks(make_federation: Make) -> None:
    assert not [row for row in make_federation(job=PLAN).run().rows() if row["name"] == "lora_drift"]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"federation.ranks": {"west": 2}}, "'west' is no party"),
        ({"federation.ranks": {"north": 5}}, "north would have rank 5"),
        ({"federation.ranks": {"north": 1, "east": 2, "south": 3}}, "no party has that rank"),
        ({"federation.robust": {"name": "NormClipping", "clip_norm": 1.0}}, "NormClipping .*E12"),
        (
            {"federation.robust": {"name": "Median", "num_malicious": 1}, "federation.min_parties": 3}
            | {"federation.lora_rule": "RoLoRA"},
            "Median .*E12",
        ),
        (SGD | {"federation.strategy": {"name": "SCAFFOLD"}}, "SCAFFOLD's correction .*E12"),
        ({"peft.use_dora": True}, "DoRA .*E12"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(plan: dict[str, Any], words: str, make_federation: Make) -> None:
    federation = make_federation(job=PLAN | plan)
    with pytest.raises(ConfigError, match=words) as caught:
        federation.run()
    assert caught.value.code == "BAD_COMBINATION" and caught.value.fix
    assert not Path(federation.folder / "run").exists()


@pytest.mark.parametrize("settings", [{"ranks": {"north": 1}}, {"lora_rule": "RoLoRA"}, {"lora_rule": "FLoRA"}])
def test_what_is_about_lora_s_factors_is_refused_for_other_methods(settings: dict[str, Any]) -> None:
    peft: Any = SimpleNamespace(peft_type="IA3", r=8, use_dora=False)
    train = TrainSettings.model_validate({"local_steps": 1, "learning_rate": 0.1, "optimizer_state": "reset"})
    found = list(
        clashes(
            Settings.model_validate({"num_rounds": 2} | settings), train, peft, PrivacySettings(), ["north", "east"]
        )
    )
    assert len(found) == 1
    key, what, _ = found[0]
    assert key == f"federation.{next(iter(settings))}" and "IA3 has no" in what


def test_a_rank_of_zero_is_no_rank(make_federation: Make) -> None:
    with pytest.raises(ConfigError, match="ranks"):
        make_federation(job=PLAN | {"federation.ranks": {"north": 0}}).job()
