"""kill -9 right before and right after noise is paid for, drawn and added, and a secure sum is noted and opened."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from crashes import committed_once, go_on, lasting, share_the_base
from test_kill import in_child
from test_secure_sums import Failing
from tiny import THOROUGH, TinyFederation, mostly_thorough

from fedllm.errors import RunPaused
from fedllm.privacy import budget, noise
from fedllm.privacy.ledger import Charge, Ledger
from fedllm.privacy.secure_sum import Combiner, Member
from fedllm.runs import folder as folder_module
from fedllm.runtime.run import resume
from fedllm.runtime.sum_messages import OpenSum
from fedllm.runtime.sum_party import PartySums
from fedllm.scenarios.fedhomollm_party_unit import PartyUnit, ServerNoise

Make = Callable[..., TinyFederation]
SIZES = {"north": 4, "east": 3, "south": 4}
ROUNDS = 2
PLAN: dict[str, Any] = {"federation.num_rounds": ROUNDS, "federation.keep": "last", "train.local_steps": 1}
HIDDEN = PLAN | {"federation.weight_by": "equal", "federation.drift_meter": False}
PARTY = {"unit": "party", "noise_multiplier": 2.0, "clip_norm": 0.5}
WAYS: dict[str, dict[str, Any]] = {
    "example": PLAN
    | {"privacy.differential_privacy": {"unit": "example", "noise_multiplier": 1.5, "accountant": "RDP"}},
    "central": HIDDEN | {"privacy.differential_privacy": PARTY},
    "distributed": HIDDEN
    | {
        "federation.codec": {"name": "Grid", "limit": 16.0},
        "privacy.secure_aggregation": {"enabled": True},
        "privacy.differential_privacy": PARTY | {"placement": "distributed"},
    },
}


class Drawn:
    """Keys and noise, in files that outlive a kill. The k-th key of a run is the same in every run, and so is its id.

    A key that was drawn and lost before it was written does not come again.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.num_keys, self.noise = folder / "keys", folder / "noise"
        monkeypatch.setattr(noise, "secrets", SimpleNamespace(token_bytes=lambda size: self.key(size)))
        monkeypatch.setattr(budget, "NoiseStream", self.open)
        monkeypatch.setattr(folder_module.uuid, "uuid4", lambda: uuid.UUID(int=7))
        self.forget()

    def forget(self) -> None:
        self.num_keys.write_bytes(b"")
        self.noise.write_bytes(b"")

    def key(self, size: int) -> bytes:
        with self.num_keys.open("ab") as file:
            file.write(b".")
        return hashlib.sha256(self.num_keys.read_bytes()).digest()[:size]

    def open(self, key: bytes, *labels: Any) -> noise.NoiseStream:
        with self.noise.open("a") as file:
            file.write(json.dumps([noise.key_name(key), *labels]) + "\n")
        return noise.NoiseStream(key, *labels)

    def told(self) -> set[tuple[Any, ...]]:
        """Return what noise was drawn in all processes: the key, the run, whose it is, the round, and for what."""
        return {tuple(json.loads(line)) for line in self.noise.read_text().splitlines()}


@dataclass(frozen=True)
class Point:
    """A function around which a process is killed; `of` says that only calls with such an argument count."""

    owner: Any
    name: str
    of: type = object

    def hook(self, setattr_: Callable[[Any, str, Any], None], act: Callable[[str, int], None]) -> None:
        """Have `act(side, number)` called before and after each call."""
        original, numbers = getattr(self.owner, self.name), count(1)

        def hooked(*args: Any, **options: Any) -> Any:
            number = next(numbers) if any(isinstance(arg, self.of) for arg in args) else 0
            act("before", number)
            result = original(*args, **options)
            act("after", number)
            return result

        setattr_(self.owner, self.name, hooked)


POINTS = {
    "bytes of a key": Point(Drawn, "key"),
    "key": Point(budget, "noise_key"),
    "charge": Point(Ledger, "add"),
    "stream": Point(budget, "NoiseStream"),
    "draw": Point(noise.NoiseStream, "integers"),
    "noise of the server": Point(ServerNoise, "added"),
    "noise of a party": Point(PartyUnit, "noised"),
    "shares": Point(Member, "open"),
    # A party notes the sum in its book before its shares leave.
    "note": Point(PartySums, "answer", OpenSum),
    "opening": Point(Combiner, "opened"),
}
_PAID = ("bytes of a key", "key", "charge", "stream", "draw")
OF_WAY = {
    "example": _PAID,
    "central": (*_PAID, "noise of the server"),
    "distributed": (*_PAID, "noise of a party", "shares", "note", "opening"),
}
CASES = [f"{way}, {side} {point}" for way in WAYS for point in OF_WAY[way] for side in ("before", "after")]
LOST_KEY = "after bytes of a key"


def purses(federation: TinyFederation) -> list[Path]:
    """Return the folders of what sites keep for all runs."""
    return [path for path in federation.folder.rglob(budget.PURSE_FOLDER) if path.is_dir()]


def kept(federation: TinyFederation) -> dict[Path, bytes]:
    """Return all that is in them: ledgers with their heads, and books of sums."""
    files = [path for purse in purses(federation) for path in purse.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if path.suffix != ".lock"}


def charges(federation: TinyFederation) -> dict[str, list[Charge]]:
    files = [path for purse in purses(federation) for path in purse.glob("*.jsonl")]
    return {path.stem: Ledger(path).charges() for path in files}


def releases(paid: dict[str, list[Charge]]) -> set[tuple[Any, ...]]:
    """Return what noise may be drawn for charges, as `Drawn.told` says it."""
    return {(c.noise, c.run, party, c.round, c.inputs) for party, found in paid.items() for c in found}


def is_killed(federation: TinyFederation, point: Point, side: str, call: int) -> bool:
    """Run in a process of its own, which is killed at one side of a call, and return whether it was."""

    def die(at: str, number: int) -> None:
        if (at, number) == (side, call):
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        point.hook(setattr, die)
        federation.run("killed")

    _, status = os.waitpid(in_child(run), 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def tried(calls: int) -> list[int]:
    """Return at which calls a process is killed: one late in the run; a dozen with `make thorough`."""
    return list(range(1, calls + 1))[:: max(1, calls // 12)] if THOROUGH else [2 * calls // 3 + 1]


@pytest.mark.parametrize(
    "case",
    mostly_thorough(
        CASES,
        f"example, {LOST_KEY}",
        "central, after noise of the server",
        "distributed, before charge",
        "distributed, after charge",
        "distributed, after note",
        "distributed, after opening",
    ),
)
def test_a_kill_changes_no_bit_and_every_release_is_paid_once(
    case: str, make_federation: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    way, what = case.split(", ")
    side, _, name = what.partition(" ")
    federation = make_federation(sizes=SIZES, job=WAYS[way])
    share_the_base(monkeypatch, federation)
    drawn, point, numbers = Drawn(monkeypatch, tmp_path), POINTS[name], [0]
    with monkeypatch.context() as patch:
        point.hook(patch.setattr, lambda side, number: numbers.append(number))
        expected = federation.run("unbroken")
    owned = kept(federation)

    assert max(numbers) > 0
    for call in tried(max(numbers)):
        drawn.forget()
        for purse in purses(federation):
            shutil.rmtree(purse)
        assert is_killed(federation, point, side, call), call
        before = charges(federation)
        # Nothing was drawn that had not been paid for, whatever comes after the kill.
        assert drawn.told() <= releases(before), call
        result = go_on(federation, "killed")
        after = charges(federation)
        assert result.status == "SUCCESS"
        assert all(after[party][: len(found)] == found for party, found in before.items()), call
        assert {party: [charge.round for charge in found] for party, found in after.items()} == {
            party: list(range(1, ROUNDS + 1)) for party in (["server"] if way == "central" else SIZES)
        }
        # As many different releases as were paid for, in the killed process and in the other one together.
        assert drawn.told() == releases(after), call
        # Where a key was lost, nothing had been drawn by it, and another one takes its place.
        is_same = what != LOST_KEY
        assert (result.adapter_sha256 == expected.adapter_sha256) == (kept(federation) == owned) == is_same, call
        committed_once(result.path, ROUNDS)
        assert not is_same or lasting(result.rows()) == lasting(expected.rows()), call
        shutil.rmtree(result.path)


def test_a_sum_whose_shares_left_before_the_kill_is_not_opened_again_without_one_of_its_parties(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    federation = make_federation(sizes=SIZES | {"west": 4}, job=WAYS["distributed"])
    share_the_base(monkeypatch, federation)
    drawn = Drawn(monkeypatch, tmp_path)
    expected = federation.run("unbroken")
    drawn.forget()
    for purse in purses(federation):
        shutil.rmtree(purse)
    # Of the evaluation and the update in turn, the fourth is the update of round 2.
    assert is_killed(federation, POINTS["opening"], "before", 4)
    # Three of four are enough for a new sum, and the difference of the two would be the fourth one's update.
    with pytest.raises(RunPaused, match="COHORT_CHANGED") as caught:
        resume(federation.folder / "killed", trainer=Failing("south"))
    assert caught.value.code == "SUM_ABORTED"
    result = resume(federation.folder / "killed")
    assert (result.status, result.adapter_sha256) == ("SUCCESS", expected.adapter_sha256)
    assert drawn.told() == releases(charges(federation))
    assert all(len(found) == ROUNDS for found in charges(federation).values())
