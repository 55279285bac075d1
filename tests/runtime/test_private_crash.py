"""kill -9 around the noise: each release is paid for once, nothing that was paid is forgotten, and no bit differs."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from crashes import Crash, Disk, committed_once, go_on, lasting, share_the_base, some
from tiny import TinyFederation

from fedllm.privacy import budget, noise
from fedllm.privacy.ledger import Charge, Ledger
from fedllm.runs import folder as folder_module

Make = Callable[..., TinyFederation]
SIZES = {"north": 5, "south": 4}
PLAN: dict[str, Any] = {
    "federation.num_rounds": 2,
    "federation.keep": "last",
    "privacy.differential_privacy": {"unit": "example", "noise_multiplier": 1.5, "accountant": "RDP"},
}


class Releases:
    """All the noise that was drawn, by what it is for; the same run id and key in every run of a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: list[tuple[Any, ...]] = []
        monkeypatch.setattr(noise.secrets, "token_bytes", lambda count: bytes(range(count)))
        monkeypatch.setattr(folder_module.uuid, "uuid4", lambda: uuid.UUID(int=7))
        monkeypatch.setattr(budget, "NoiseStream", self._open)

    def _open(self, key: bytes, *labels: Any) -> noise.NoiseStream:
        self.drawn.append(labels)
        return noise.NoiseStream(key, *labels)


def charges(federation: TinyFederation) -> dict[str, list[Charge]]:
    folder = federation.folder / "parties" / "privacy"
    return {party: Ledger(folder / f"{party}.jsonl").charges() for party in SIZES}


def test_a_crash_at_any_touch_of_the_disk_costs_no_budget_and_loses_none(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN)
    share_the_base(monkeypatch, federation)
    releases, disk = Releases(monkeypatch), Disk(monkeypatch)
    expected = federation.run("unbroken")
    paid, points = charges(federation), disk.count
    assert [len(found) for found in paid.values()] == [2, 2]
    assert points > 60
    for point in some(range(1, points + 1), every=11):
        shutil.rmtree(federation.folder / "parties" / "privacy")
        releases.drawn.clear()
        name = f"crash{point}"
        with pytest.raises(Crash), disk.crashing_at(point):
            federation.run(name)
        result = go_on(federation, name)
        assert (result.status, result.adapter_sha256) == ("SUCCESS", expected.adapter_sha256), point
        assert charges(federation) == paid, point
        # Whatever was drawn again was the same draw: as many different ones as were paid for.
        told = {(run, party, number, inputs) for run, party, number, inputs in releases.drawn}
        owed = {(c.run, party, c.round, c.inputs) for party, found in paid.items() for c in found}
        assert told == owed, point
        committed_once(result.path, 2)
        assert lasting(result.rows()) == lasting(expected.rows()), point
        shutil.rmtree(result.path)


def test_a_charge_is_on_the_disk_before_its_noise_is_drawn(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN)
    seen: list[bool] = []

    def draw(key: bytes, run: str, party: str, number: int, inputs: str) -> noise.NoiseStream:
        found = Ledger(federation.folder / "parties" / "privacy" / f"{party}.jsonl").charges()
        seen.append((found[-1].run, found[-1].round, found[-1].inputs) == (run, number, inputs))
        return noise.NoiseStream(key, run, party, number, inputs)

    monkeypatch.setattr(budget, "NoiseStream", draw)
    federation.run()
    assert seen == [True] * 4
