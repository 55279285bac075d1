"""A party with the right keys that misbehaves, in real processes: it is named, and the others' result is untouched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deployed import Deployed, deployed
from tiny import TinyFederation, thorough

pytest.importorskip("nvflare")

from faults import FAULTS, PRIVATE, install

Make = Callable[..., TinyFederation]
PLAN: dict[str, Any] = {
    "federation.num_rounds": 7,
    "federation.min_parties": 2,
    "federation.round_timeout": 10.0,
    "federation.keep": "last",
    "federation.eval_every": 0,
    "train.local_steps": 5,
    "train.optimizer_state": "reset",
}
pytestmark = pytest.mark.processes
# East's fault by round, and the code under which the server notes it; None where its update counts all the same.
BY_ROUND = {1: ("raise", "PARTY_FAILED"), 2: ("nan", "NONFINITE"), 3: ("shape", "PAYLOAD_REFUSED"),
            4: ("twice", None), 5: ("replay", None), 6: ("stuck", "ROUND_TIMEOUT")}  # fmt: skip
SIZES = {"north": 6, "east": 5, "south": 5}


@thorough
@pytest.mark.timeout(600)
def test_a_party_that_misbehaves_is_named_and_the_others_go_on_to_the_same_bits(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN)
    expected = undisturbed_by_east(federation, monkeypatch)
    faulty = os.pathsep.join([str(Path(__file__).parent / "faulty"), os.environ.get("PYTHONPATH", "")])
    said = " ".join(["east", *(f"{number}={fault}" for number, (fault, _) in BY_ROUND.items())])
    environment = {"PYTHONPATH": faulty, FAULTS: said}
    with deployed(federation.job_file, federation.folder / "up", environment=environment) as up:
        assert up.end() == 0
        assert failures(up) == {number: code for number, (_, code) in BY_ROUND.items() if code}
        assert stale(up) >= 1
        assert up.verdict()["adapter_sha256"] == expected
        commits = [number for number, step in up.journal() if step == "commit"]
        assert commits == list(range(8))
        # What went wrong at a site stays there.
        coordinator = up.root / "coordinator"
        assert not [path for path in coordinator.rglob("*") if path.is_file() and PRIVATE.encode() in path.read_bytes()]


def undisturbed_by_east(federation: TinyFederation, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the adapter of a run in this process in which east fails in just the rounds that do not count."""
    from fedllm.runtime.host import PartyHost

    with monkeypatch.context() as patch:
        for name in ("_handle", "_packed"):
            patch.setattr(PartyHost, name, getattr(PartyHost, name))
        install("east", {number: "raise" for number, (_, code) in BY_ROUND.items() if code})
        result = federation.run("expected")
    assert result.adapter_sha256
    return result.adapter_sha256


def failures(up: Deployed) -> dict[int, str]:
    rows = [json.loads(line) for line in (up.run / "events.jsonl").read_text().splitlines()]
    return {row["round"]: row["code"] for row in rows if row["party"] == "east" and row["event"] == "party_failed"}


def stale(up: Deployed) -> int:
    rows = [json.loads(line) for line in (up.run / "events.jsonl").read_text().splitlines()]
    return sum(row["code"] == "STALE_ROUND" for row in rows)
