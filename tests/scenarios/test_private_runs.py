"""Runs with differential privacy, over the wire: what is told, what is paid, and the same bits after a crash."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rounds import broken_and_resumed, own_adapters
from tiny import TinyFederation, mostly_thorough, write_jsonl

from fedllm.errors import BudgetExhausted, ConfigError, ExitCode, FedllmError, RunFailed, RunPaused, StateLost
from fedllm.privacy.accountant import Mechanism, epsilon_of
from fedllm.privacy.ledger import Ledger
from fedllm.runs.jsonl import read_rows
from fedllm.runtime.plan import make_plan
from fedllm.runtime.run import Watch, read_result, resume
from fedllm.runtime.validate import validate
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.private import PrivateTrainer
from fedllm.train.supervised import SupervisedTrainer

Make = Callable[..., TinyFederation]
SIZES = {"north": 6, "south": 9}
NOISE: dict[str, Any] = {"unit": "example", "noise_multiplier": 1.5, "accountant": "RDP"}
# The last round is delivered: noise may make the first adapter the best, and that one has no noise to compare.
PLAN: dict[str, Any] = {
    "federation.num_rounds": 3,
    "federation.keep": "last",
    "privacy.differential_privacy": NOISE,
}


@pytest.fixture
def one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all runs draw the same noise: their id and their key are part of it."""
    import uuid

    from fedllm.privacy import noise
    from fedllm.runs import folder

    monkeypatch.setattr(noise.secrets, "token_bytes", lambda count: bytes(range(count)))
    monkeypatch.setattr(folder.uuid, "uuid4", lambda: uuid.UUID(int=7))


def ledger_of(federation: TinyFederation, party: str) -> Ledger:
    return Ledger(federation.folder / "parties" / "privacy" / f"{party}.jsonl")


def test_a_run_pays_for_each_round_and_tells_nothing_but_epsilon(make_federation: Make) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN)
    result = federation.run()
    assert result.status == "SUCCESS"
    rows = read_rows(result.path / "metrics.jsonl")
    for party, size in SIZES.items():
        spent = {row["round"]: row["value"] for row in rows if (row["party"], row["name"]) == (party, "epsilon_spent")}
        expected = {
            number: epsilon_of([Mechanism(3 / size, 1.5, 2 * number)], delta=1e-5, accountant="RDP")
            for number in (1, 2, 3)
        }
        assert spent == pytest.approx(expected, rel=1e-6)
        assert [charge.round for charge in ledger_of(federation, party).charges()] == [1, 2, 3]
    told = {row["name"] for row in rows if row["split"] == "train" and row["value"] is not None}
    assert told == {"steps"}
    own = read_rows(result.path / "parties" / "north" / "metrics.jsonl")
    assert not {row["name"] for row in own if row["split"] == "train"} & {"loss_nats", "tokens", "examples"}


def test_a_broken_run_goes_on_with_the_same_bits_and_pays_once(make_federation: Make, one_key: None) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN)
    expected = federation.run("unbroken").adapter_sha256
    paid = ledger_of(federation, "north").charges()
    for file in (federation.folder / "parties" / "privacy").iterdir():
        file.unlink()
    assert broken_and_resumed(federation, after=2).adapter_sha256 == expected
    assert ledger_of(federation, "north").charges() == paid


def test_two_runs_have_other_noise(make_federation: Make) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN | {"federation.num_rounds": 1, "federation.keep": "last"})
    assert federation.run("one").adapter_sha256 != federation.run("two").adapter_sha256
    assert len({charge.run for charge in ledger_of(federation, "north").charges()}) == 2


def test_a_run_with_an_epsilon_ends_within_it(make_federation: Make) -> None:
    asked = {"unit": "example", "epsilon": 4.0}
    federation = make_federation(sizes=SIZES, job=PLAN | {"privacy.differential_privacy": asked})
    result = federation.run()
    last = [row for row in result.rows() if row["name"] == "epsilon_spent" and row["round"] == 3]
    assert {row["party"] for row in last} == set(SIZES)
    assert all(3.9 < row["value"] <= 4.0 for row in last)
    plan = make_plan(federation.job(), federation.parties(), validate(federation.job(), federation.parties()))
    assert [(found.party, found.num_units) for found in plan.noise] == list(SIZES.items())
    told = {row["party"]: row["value"] for row in last}
    assert {found.party: found.epsilon for found in plan.noise} == pytest.approx(told, rel=1e-6)
    # A plan is no run: nothing was paid for it.
    assert len(ledger_of(federation, "north").charges()) == 3
    most = max(told.values())
    for file in ("report.html", "adapter/README.md"):
        text = (result.path / file).read_text(encoding="utf-8")
        assert f"{most:.3f}" in text and "per example at delta 1e-05" in text and "PLD accountant" in text, file
    assert "No differential privacy was applied" not in text


def test_a_site_ends_a_run_before_the_round_that_would_pass_its_limit(make_federation: Make) -> None:
    """The first run leaves too little of the site's budget for a second one."""
    asked = {"unit": "example", "epsilon": 4.0, "accountant": "RDP"}
    federation = make_federation(
        sizes=SIZES, job=PLAN | {"privacy.differential_privacy": asked}, party={"limits": {"max_epsilon": 5.0}}
    )
    plan = make_plan(federation.job(), federation.parties(), validate(federation.job(), federation.parties()))
    assert not any("earlier" in found.text for found in plan.noise)
    federation.run("first")
    with pytest.raises(BudgetExhausted) as caught:
        federation.run("second")
    assert (caught.value.code, caught.value.exit_code) == ("BUDGET_EXHAUSTED", ExitCode.BUDGET)
    # The plan said so beforehand, of a run that has spent nothing yet.
    plan = make_plan(federation.job(), federation.parties(), validate(federation.job(), federation.parties()))
    assert all("ABOVE the 5 that the site allows" in found.text for found in plan.noise)
    result = read_result(federation.folder / "second")
    assert result is not None and (result.status, result.rounds) == ("FAILED", caught_round(caught.value) - 1)
    charges = ledger_of(federation, "north").charges()
    assert len(charges) == 3 + result.rounds
    mechanisms = [charge.mechanism for charge in charges]
    assert epsilon_of(mechanisms, delta=1e-5, accountant="RDP") <= 5.0
    assert epsilon_of([*mechanisms, mechanisms[-1]], delta=1e-5, accountant="RDP") > 5.0


def caught_round(error: FedllmError) -> int:
    return int(error.where.removeprefix("round "))


def test_a_run_whose_ledger_was_deleted_does_not_go_on(make_federation: Make) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN)

    def stop(number: int, rows: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.run(watch=Watch(on_round=stop))
    for file in (federation.folder / "parties" / "privacy").iterdir():
        file.unlink()
    with pytest.raises(StateLost) as caught:
        resume(federation.folder / "run")
    assert caught.value.code == "LEDGER_BROKEN"


def test_all_examples_of_a_person_are_one_unit(make_federation: Make) -> None:
    asked = {"unit": "group", "noise_multiplier": 1.5, "accountant": "RDP"}
    changes = {"privacy.differential_privacy": asked, "data.group_by": "who", "train.per_device_train_batch_size": 1}
    federation = make_federation(sizes=SIZES, job=PLAN | changes)
    for party in SIZES:
        rows = read_rows(federation.folder / "data" / f"{party}.jsonl")
        write_jsonl(
            federation.folder / "data" / f"{party}.jsonl",
            [row | {"who": f"person {number % 4}"} for number, row in enumerate(rows)],
        )
        held = read_rows(federation.folder / "data" / f"{party}-eval.jsonl")
        write_jsonl(federation.folder / "data" / f"{party}-eval.jsonl", [row | {"who": "another"} for row in held])
    assert federation.run().status == "SUCCESS"
    charges = ledger_of(federation, "south").charges()
    assert [(charge.unit, charge.sampling_rate) for charge in charges] == [("group", 1 / 4)] * 3


def test_a_record_that_names_nobody_is_refused_where_persons_count(make_federation: Make) -> None:
    asked = {"unit": "group", "noise_multiplier": 1.5}
    federation = make_federation(
        sizes=SIZES, job=PLAN | {"privacy.differential_privacy": asked, "data.group_by": "who"}
    )
    with pytest.raises(FedllmError) as caught:
        federation.run()
    assert caught.value.code == "DATA_BROKEN_LINE" and "names nobody" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"privacy.differential_privacy": {"unit": "group", "noise_multiplier": 1.0}}, "differential_privacy.unit"),
        ({"data.group_by": "who"}, "data.group_by"),
    ],
)
def test_persons_need_a_column_and_a_column_needs_persons(
    make_federation: Make, changes: dict[str, Any], key: str
) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN | {"privacy.differential_privacy": None} | changes)
    with pytest.raises(ConfigError) as caught:
        federation.run()
    assert caught.value.code == "BAD_COMBINATION" and "group" in str(caught.value)


def test_a_trainer_that_bounds_nothing_is_refused(make_federation: Make) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN)
    with pytest.raises(ConfigError, match="SupervisedTrainer"):
        federation.run(trainer=SupervisedTrainer())


FOLLOWS: dict[str, dict[str, Any]] = {
    "SCAFFOLD": {"federation.strategy": {"name": "SCAFFOLD"}, "train.optim": "sgd"},
    "RoLoRA": {"federation.lora_rule": "RoLoRA"},
    "FedSA": {"federation.lora_rule": "FedSA-LoRA"},
    "codec": {"federation.codec": {"name": "int8", "error_feedback": True}},
    "FedProx": {"federation.strategy": {"name": "FedProx"}},
    "AdaLoRA": {"peft": {"peft_type": "ADALORA", "target_modules": ["q_proj"]}},
}


@pytest.mark.parametrize("case", mostly_thorough(FOLLOWS, "SCAFFOLD", "FedSA", "codec"))
def test_what_follows_from_noisy_training_alone_goes_with_it_and_survives_a_break(
    make_federation: Make, one_key: None, case: str
) -> None:
    changes = {"federation.num_rounds": 4} | FOLLOWS[case]
    federation = make_federation(sizes=SIZES, job=PLAN | changes)
    expected = federation.run("unbroken")
    shutil.rmtree(federation.folder / "parties" / "privacy")
    found = broken_and_resumed(federation, after=2)
    assert found.adapter_sha256 == expected.adapter_sha256
    assert own_adapters(found) == own_adapters(expected)
    assert len(ledger_of(federation, "north").charges()) == 4


def test_a_round_that_another_party_missed_is_not_paid_for_twice(
    make_federation: Make, one_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN)
    expected = federation.run("unbroken")
    paid = ledger_of(federation, "north").charges()
    shutil.rmtree(federation.folder / "parties" / "privacy")
    train, missed = PrivateTrainer.train, []

    def late(self: PrivateTrainer, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        if (task.party, task.round) == ("south", 2) and not missed:
            missed.append(task.round)
            raise RunFailed("ROUND_TIMEOUT", "too late")
        return train(self, task, optimizer)

    monkeypatch.setattr(PrivateTrainer, "train", late)
    with pytest.raises(RunPaused, match="ROUND_TIMEOUT"):
        federation.run("missed")
    assert resume(federation.folder / "missed").adapter_sha256 == expected.adapter_sha256
    assert missed == [2]
    assert ledger_of(federation, "north").charges() == paid


def test_a_lost_checkpoint_of_the_server_does_not_make_a_party_pay_again(
    make_federation: Make, one_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(sizes=SIZES | {"east": 5}, job=PLAN)
    train, is_away = PrivateTrainer.train, [True]
    noise: dict[tuple[int, bool], bytes] = {}

    def sometimes(self: PrivateTrainer, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        assert task.private is not None
        if task.party == "north":
            noise[task.round, is_away[0]] = task.private.normals(4, "look").tobytes()
        elif task.party == "south" and is_away[0]:
            raise RunFailed("ROUND_TIMEOUT", "too late")
        return train(self, task, optimizer)

    def stop(number: int, rows: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(PrivateTrainer, "train", sometimes)
    with pytest.raises(KeyboardInterrupt):
        federation.run(watch=Watch(on_round=stop))
    is_away[0] = False
    (federation.folder / "run" / "checkpoints" / "round-000002.ckpt").unlink()
    resume(federation.folder / "run")
    # Round 2 starts from the same adapter as before, so it is the same release; round 3 from another one.
    assert noise[2, False] == noise[2, True]
    assert [charge.round for charge in ledger_of(federation, "north").charges()] == [1, 2, 3]
