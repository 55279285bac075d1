"""kill -9 at any moment: of the run, and of a worker process; then go on."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from crashes import committed_once, go_on, lasting
from tiny import TinyFederation, thorough

from fedllm.errors import RunPaused
from fedllm.runs.jsonl import read_rows
from fedllm.runtime.run import Watch, resume

Make = Callable[..., TinyFederation]
PLAN: dict[str, Any] = {
    "federation.num_rounds": 5,
    "federation.strategy": {"name": "FedAvgM", "server_momentum": 0.6},
    "federation.keep": "last",
    "peft.lora_dropout": 0.1,
    "train.local_steps": 5,
}
# So that blows fall around the opening of secure sums, too.
SECURE: dict[str, Any] = {
    "federation.codec": {"name": "Grid", "limit": 0.5},
    "privacy.secure_aggregation": {"enabled": True},
}


def in_child(work: Callable[[], Any]) -> int:
    """Do something in a process of its own, which has all libraries loaded, and return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            # Without the clean-up of the tests' own process.
            os._exit(code)
    return child


def wait_for(happened: Callable[[], bool], *, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_five_kills_at_random_moments_change_nothing(make_federation: Make) -> None:
    federation = make_federation(job=PLAN | SECURE)
    started = time.monotonic()
    expected = federation.run("unbroken")
    usual = time.monotonic() - started
    path, draw = federation.folder / "broken", random.Random(5)
    kills, tries = 0, 0
    while kills < 5:
        tries += 1
        assert tries < 40
        child = in_child(lambda: go_on(federation, "broken"))
        time.sleep(draw.uniform(0.05, 0.45) * usual)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        else:
            # It was done before the blow fell: begin another.
            assert os.waitstatus_to_exitcode(status) == 0
            assert go_on(federation, path.name).adapter_sha256 == expected.adapter_sha256
            committed_once(path, 5)
            path.rename(federation.folder / f"done{tries}")
    result = go_on(federation, "broken")
    assert (result.status, result.adapter_sha256) == ("SUCCESS", expected.adapter_sha256)
    committed_once(path, 5)
    assert lasting(result.rows()) == lasting(expected.rows())


def begun(path: Path, number: int) -> bool:
    return any(row["round"] == number for row in read_rows(path / "journal.jsonl"))


@thorough
def test_workers_of_a_killed_run_do_not_disturb_the_one_that_goes_on(make_federation: Make) -> None:
    """An orphan in the midst of a long round would still write into its party's files."""
    changes = {"federation.num_rounds": 2, "train.local_steps": 150}
    federation = make_federation(sizes={"north": 6, "south": 4}, job=PLAN | changes)
    expected = federation.run("unbroken")
    path = federation.folder / "broken"
    child = in_child(lambda: federation.run("broken", num_workers=1))
    wait_for(lambda: begun(path, 1))
    workers = psutil.Process(child).children(recursive=True)
    assert len(workers) == 1
    time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    result = resume(path)
    assert result.adapter_sha256 == expected.adapter_sha256
    committed_once(path, 2)
    assert lasting(result.rows()) == lasting(expected.rows())
    wait_for(lambda: not workers[0].is_running() or workers[0].status() == psutil.STATUS_ZOMBIE, seconds=10)


def test_a_worker_ends_when_the_process_that_started_it_is_gone() -> None:
    # Its socket stays open here, and no order comes: only the missing parent can end it.
    ours, theirs = socket.socketpair()
    with ours, theirs:
        nobody = "1"
        command = [sys.executable, "-m", "fedllm.runtime.workers", str(theirs.fileno()), nobody]
        worker = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        try:
            assert worker.wait(60) == 1
        finally:
            worker.kill()


def test_a_killed_worker_pauses_the_run(make_federation: Make) -> None:
    federation = make_federation(sizes={"north": 6, "south": 4}, job=PLAN)
    expected = federation.run("unbroken")

    def kill(number: int, rows: Any) -> None:
        if number == 2:
            for worker in psutil.Process().children(recursive=True):
                worker.kill()

    with pytest.raises(RunPaused) as caught:
        federation.run("broken", num_workers=1, watch=Watch(on_round=kill))
    assert caught.value.code == "PARTY_FAILED"
    assert caught.value.where in ("party north", "party south")
    result = resume(federation.folder / "broken")
    assert result.adapter_sha256 == expected.adapter_sha256
    committed_once(result.path, 5)
