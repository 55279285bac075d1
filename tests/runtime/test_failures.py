"""Parties that fail, interruptions and full disks: who is told what, what goes on, and from where it is resumed."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from crashes import committed_once, lasting
from tiny import TinyFederation

from fedllm.errors import ExitCode, FedllmError, ResourceError, RunFailed, RunPaused
from fedllm.runs.folder import RunFolder
from fedllm.runs.jsonl import read_rows
from fedllm.runtime.driver import Driver
from fedllm.runtime.run import Watch, read_result, resume
from fedllm.scenarios.base import Reply
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.supervised import SupervisedTrainer
from fedllm.wire.payload import Failure

Make = Callable[..., TinyFederation]
PLAN = {"federation.num_rounds": 3, "federation.keep": "last"}


@dataclass
class Failing:
    """Trains as usual, except for some parties in some rounds."""

    how: Callable[[TrainTask, torch.optim.Optimizer], TrainSums]
    parties: tuple[str, ...]
    rounds: tuple[int, ...] = (2,)

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        if task.party in self.parties and task.round in self.rounds:
            return self.how(task, optimizer)
        return SupervisedTrainer().train(task, optimizer)


def at_once(task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
    raise RunFailed("NONFINITE", "it diverged")


def with_nan_gradients(task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
    for parameter in task.model.trainable.values():
        parameter.grad = torch.full_like(parameter, float("nan"))
        parameter.data.fill_(float("nan"))
    raise RunFailed("NONFINITE", "it diverged")


def after_some_steps(task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
    SupervisedTrainer().train(task, optimizer)
    raise ValueError("row 7: 'Alice pays 300'")


def with_nan_update(task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
    sums = SupervisedTrainer().train(task, optimizer)
    next(iter(task.model.trainable.values())).data[0, 0] = float("nan")
    return sums


def too_slow(task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
    return SupervisedTrainer().train(replace(task, deadline=time.monotonic() - 1), optimizer)


def events(path: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(path / "events.jsonl") if row["event"] == name]


def verdict(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "result.json").read_text())
    return found


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (at_once, "NONFINITE"),
        (after_some_steps, "PARTY_FAILED"),
        (with_nan_update, "NONFINITE"),
        (too_slow, "ROUND_TIMEOUT"),
    ],
)
def test_the_run_goes_on_without_a_failing_party_and_says_so(how: Any, code: str, make_federation: Make) -> None:
    result = make_federation(job=PLAN).run(trainer=Failing(how, ("south",)))
    assert (result.status, result.rounds) == ("PARTIAL", 3)
    failed = events(result.path, "party_failed")
    assert [(row["party"], row["round"], row["code"]) for row in failed] == [("south", 2, code)]
    assert "south" in verdict(result.path)["reason"]
    assert "Alice" not in "".join(path.read_text() for path in result.path.rglob("*.json*"))
    committed_once(result.path, 3)
    losses = [row["value"] for row in result.rows() if row["name"] == "loss_nats"]
    assert all(value is not None and value < 20 for value in losses)


def test_how_a_party_fails_makes_no_difference_to_the_others(make_federation: Make) -> None:
    shas = {
        how.__name__: make_federation(how.__name__, job=PLAN).run(trainer=Failing(how, ("south",))).adapter_sha256
        for how in (at_once, with_nan_gradients, after_some_steps, with_nan_update, too_slow)
    }
    assert len(set(shas.values())) == 1, shas


def test_a_first_party_that_leaves_nan_behind_does_not_spoil_the_next(make_federation: Make) -> None:
    shas = {
        how.__name__: make_federation(how.__name__, job=PLAN).run(trainer=Failing(how, ("north",))).adapter_sha256
        for how in (at_once, with_nan_gradients)
    }
    assert len(set(shas.values())) == 1, shas


@pytest.mark.parametrize("how", [at_once, after_some_steps, with_nan_update])
def test_a_run_with_a_failed_party_resumes_to_the_same_adapter(how: Any, make_federation: Make) -> None:
    """The failing party's optimiser state must be the one it would have had without the crash."""
    federation = make_federation(job=PLAN)
    trainer = Failing(how, ("south",))
    expected = federation.run("unbroken", trainer=trainer)

    def stop(number: int, rows: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.run("broken", trainer=trainer, watch=Watch(on_round=stop))
    result = resume(federation.folder / "broken", trainer=trainer)
    assert (result.status, result.adapter_sha256) == ("PARTIAL", expected.adapter_sha256)


def test_below_the_quorum_the_run_fails_by_name_and_can_be_resumed_once_mended(make_federation: Make) -> None:
    federation = make_federation(job=PLAN)
    expected = federation.run("unbroken")
    with pytest.raises(RunFailed) as caught:
        federation.run("broken", trainer=Failing(at_once, ("south", "east")))
    assert (caught.value.code, caught.value.exit_code) == ("QUORUM", ExitCode.FAILED)
    for word in ("south: NONFINITE", "east: NONFINITE"):
        assert word in caught.value.what
    path = federation.folder / "broken"
    assert (verdict(path)["status"], verdict(path)["rounds"]) == ("FAILED", 1)
    assert "resume" in verdict(path)["next"]
    result = resume(path)
    assert result.adapter_sha256 == expected.adapter_sha256
    committed_once(path, 3)


def test_below_the_quorum_for_slowness_the_run_pauses(make_federation: Make) -> None:
    federation = make_federation(job=PLAN)
    with pytest.raises(RunPaused) as caught:
        federation.run("broken", trainer=Failing(too_slow, ("south", "east")))
    assert (caught.value.code, caught.value.exit_code) == ("QUORUM", ExitCode.PAUSED)
    assert verdict(federation.folder / "broken")["status"] == "PAUSED"
    assert resume(federation.folder / "broken").adapter_sha256 == federation.run("unbroken").adapter_sha256


def test_round_timeout_ends_a_party_s_round(make_federation: Make) -> None:
    federation = make_federation(job=PLAN | {"federation.round_timeout": 1e-9})
    with pytest.raises(FedllmError) as caught:
        federation.run()
    assert caught.value.code == "QUORUM"
    assert "ROUND_TIMEOUT" in caught.value.what


def test_an_interrupted_run_says_paused_and_resumes_to_the_same_bits(make_federation: Make) -> None:
    federation = make_federation(job=PLAN)
    expected = federation.run("unbroken")

    def stop(party: str, step: int, num_steps: int) -> None:
        if party == "east":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.run("broken", watch=Watch(on_step=stop))
    assert verdict(federation.folder / "broken")["status"] == "PAUSED"
    assert read_result(federation.folder / "broken").adapter_sha256 is None  # type: ignore[union-attr]
    result = resume(federation.folder / "broken")
    assert result.adapter_sha256 == expected.adapter_sha256
    assert lasting(result.rows()) == lasting(expected.rows())
    assert len(events(result.path, "run_resumed")) == 1


@pytest.mark.parametrize("point", [1, 7, 20, 33, 47, 60, 75])
def test_a_full_disk_pauses_the_run_and_leaves_no_half_file(
    point: int, make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The quorum needs everybody, so that a party's full disk pauses the run as the server's does.
    federation = make_federation(job=PLAN | {"federation.min_parties": 3})
    expected = federation.run("unbroken")
    count = 0

    def fsync(handle: int) -> None:
        nonlocal count
        count += 1
        if count >= point:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises((ResourceError, RunPaused)) as caught:
            federation.run("broken")
    assert caught.value.code in ("DISK_FULL", "QUORUM")
    assert caught.value.exit_code in (ExitCode.RESOURCES, ExitCode.PAUSED)
    assert caught.value.fix
    path = federation.folder / "broken"
    assert not list(path.rglob("*.tmp"))
    for checkpoints in path.rglob("checkpoints"):
        assert all(file.stat().st_size > 100 for file in checkpoints.iterdir())
    result = resume(path) if (path / "local.json").exists() else federation.run("broken")
    assert result.adapter_sha256 == expected.adapter_sha256
    committed_once(path, 3)


@pytest.mark.parametrize(
    ("refused", "error", "code", "where", "what"),
    [
        ({"south": "NOT_APPROVED"}, RunPaused, "NOT_APPROVED", "party south", "the party cannot take part"),
        (
            {"south": "NOT_APPROVED", "east": "NOT_APPROVED", "north": "DISK_FULL"},
            RunPaused,
            "DISK_FULL",
            "party north",
            "the party cannot take part; east: NOT_APPROVED; south: NOT_APPROVED",
        ),
        (
            {"south": "NOT_APPROVED", "east": "NOT_APPROVED"},
            RunPaused,
            "NOT_APPROVED",
            "party east, south",
            "these parties cannot take part",
        ),
        (
            {"east": "DISK_FULL", "south": "PARTY_FAILED"},
            RunFailed,
            "PARTY_FAILED",
            "party south",
            "the party cannot take part; east: DISK_FULL",
        ),
    ],
)
def test_all_parties_that_refuse_the_handshake_are_named_at_once(
    refused: dict[str, str], error: type[FedllmError], code: str, where: str, what: str, tmp_path: Path
) -> None:
    replies = [Reply(party, Failure(code=found)) for party, found in refused.items()]
    federation: Any = SimpleNamespace(parties=["east", "north", "south"], ask=lambda *_, **__: iter(replies))
    run = RunFolder.create(tmp_path / "run", job_digest="1" * 64)
    with closing(run), pytest.raises(error) as caught:
        Driver(run, federation, server=federation, num_rounds=1).drive()
    assert (caught.value.code, caught.value.where, caught.value.what) == (code, where, what)
