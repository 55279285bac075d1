"""Who is there, who is gone, and why a job of FLARE did not begin."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nvflare")

from fedllm.runtime.flare import clerk as module
from fedllm.runtime.flare.clerk import Attempts, Clerk


def engine(*, listed: list[str], standing: list[str]) -> Any:
    clients = [SimpleNamespace(name=name) for name in listed]
    cell = SimpleNamespace(core_cell=SimpleNamespace(agents=dict.fromkeys(standing)))
    return SimpleNamespace(get_clients=lambda: clients, get_cell=lambda: cell)


def test_a_party_whose_connection_ended_is_away_though_flare_still_lists_it() -> None:
    found = module._connected(
        engine(listed=["south", "north", "east"], standing=["north", "south", "east.job", "admin"])
    )
    assert found == ["north", "south"]


def test_the_wait_for_a_lost_party_begins_when_it_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: moment)
    attempts = Attempts(job_id="job")
    assert not Clerk._has_lost(attempts, engine(listed=[], standing=["north.job", "east.job"]))
    monkeypatch.setattr(module.time, "monotonic", lambda: moment + 10)
    assert not Clerk._has_lost(attempts, engine(listed=[], standing=["north.job"])), "it may come back"
    monkeypatch.setattr(module.time, "monotonic", lambda: moment + 20)
    assert Clerk._has_lost(attempts, engine(listed=[], standing=["north.job"]))
    assert attempts.waits == moment + 10
    assert attempts.waiting_since
    assert attempts.why == "the process of east ended"


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ([], ""),
        (["server: OK", "north: OK"], ""),
        (
            ["server: OK", "east: exception_occurred: OSError: [Errno 28] No space left on device: /home/carla/x"],
            "east: DISK_FULL",
        ),
        (
            ["server: OK", "north: Exception: secret", "east: no reply (deployment timeout)", "num_ok_sites 0 < 2"],
            "north: the job cannot be begun there, east: the job cannot be begun there",
        ),
        (["server: OK", "invalid_clients: north", "failed to deploy to required client north"], ""),
    ],
)
def test_a_site_that_did_not_take_a_job_is_named_without_its_own_words(told: list[str], why: str) -> None:
    assert module._why_not(told) == why
