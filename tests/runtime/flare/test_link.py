"""The link between machines, its other ends in this process: loss, doubles, cuts, lateness, sizes and lies."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fake_channel import Air, Net, net

from fedllm.errors import ResourceError, RunPaused
from fedllm.runtime.base import SERVER
from fedllm.runtime.federation import LinkedFederation
from fedllm.runtime.flare import link as link_module
from fedllm.runtime.flare.channel import Topic
from fedllm.runtime.flare.desk import Desk
from fedllm.runtime.flare.pieces import asker
from fedllm.scenarios.base import Summand
from fedllm.wire import spool as spool_module
from fedllm.wire.blob import Blob, Buffer, in_place
from fedllm.wire.frame import Frame, Parcel, decode, encode, pack, unpack, with_blob
from fedllm.wire.payload import Failure, Payload, TensorMap, Tensors, manifest_of
from fedllm.wire.spool import INLINE_BYTES, Spool

JOB, RUN = "a" * 64, "b" * 32


class Question(Payload):
    """A request with tensors."""

    commits: ClassVar[bool] = True
    adapter: TensorMap


KINDS: dict[str, type[Payload]] = {cls.__name__: cls for cls in (Question, Summand, Failure)}
SMALL = {"w": torch.ones(1000), "v": torch.zeros(20, 20)}
LARGE = {f"layer{number}": torch.full((200, 300), float(number)) for number in range(8)}
assert sum(tensor.nbytes for tensor in LARGE.values()) > INLINE_BYTES


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((link_module, "_RETRY_S"), (spool_module, "_RETRY_S")):
        monkeypatch.setattr(module, name, 0.01)
    monkeypatch.setattr(link_module, "_GRACE_S", 0.2)


@dataclass
class Party:
    """Adds `value` to the tensors that it is sent; `change` may spoil the answer."""

    desk: Desk
    spool: Spool
    value: float
    change: Callable[[Frame], Frame] = lambda frame: frame
    before: Callable[[], None] = lambda: None
    held: dict[str, Blob] = field(default_factory=dict)
    asked: int = 0
    closed: bool = False

    def handle(self, parcel: Parcel, *, timeout_s: float) -> Parcel:
        self.asked += 1
        frame = unpack(parcel, max_bytes=2**30)
        if not frame.blob and frame.blob_digest not in self.held:
            ask = asker(self.desk.way, SERVER, frame.blob_digest)
            blob = self.spool.pull(
                frame.blob_digest, frame.blob_size, sender=SERVER, ask=ask, cancelled=self.desk.is_closed
            )
            frame = replace(frame, blob=blob)
        frame = with_blob(frame, self.held)
        assert frame.blob is not None
        self.held = {frame.blob_digest: frame.blob}
        self.before()
        question = decode(frame, KINDS)
        assert isinstance(question, Question)
        update = {name: tensor + self.value for name, tensor in question.adapter.items()}
        answer = Summand(weight=1, counts={"n": 1.0}, tensors=update)
        return pack(self.change(encode(answer, frame.envelope.reply(), keep=in_place)))

    def close(self) -> None:
        self.closed = True


class World:
    """Parties by name, each with its spool; what is asked of them and what came of it."""

    def __init__(self, folder: Path, air: Air | None = None, **options: dict[str, Any]) -> None:
        self.folder, self.air, self.parties = folder, air or Air(), dict[str, Party]()
        self._options = options

    def opener(self, name: str, value: float) -> Callable[[Desk], Party]:
        def open_party(desk: Desk) -> Party:
            self.parties[name] = Party(desk, Spool(self.folder / name), value, **self._options.get(name, {}))
            return self.parties[name]

        return open_party

    def __enter__(self) -> tuple[Net, LinkedFederation]:
        openers = {name: self.opener(name, value) for name, value in VALUES.items()}
        self._net = net(self.folder, openers, air=self.air)
        made = self._net.__enter__()
        federation = made.federation(kinds=KINDS, job_digest=JOB, run_id=RUN, timeout_s=120)
        federation.expect(manifest_of(LARGE))
        return made, federation

    def __exit__(self, *error: object) -> None:
        self._net.__exit__(None, None, None)
        assert all(party.closed for party in self.parties.values())


VALUES = {"north": 1.0, "south": 2.0, "west": 6.0}


def total_of(federation: LinkedFederation, adapter: Tensors, round_: int = 1, **options: Any) -> Any:
    request = Question(adapter=adapter)
    return federation.total(request, round_=round_, to=federation.parties, manifest=manifest_of(adapter), **options)


def check(total: Any, adapter: Tensors, *, parties: tuple[str, ...] = tuple(VALUES), failures: Any = None) -> None:
    assert (total.parties, total.failures) == (parties, failures or {})
    mean = sum(VALUES[party] for party in parties) / len(parties)
    assert set(total.means) == set(adapter)
    for name, tensor in total.means.items():
        assert (tensor - adapter[name]).unique().tolist() == [pytest.approx(mean)]
    assert total.counts == {"n": float(len(parties))}


def spooled(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_small_tensors_travel_inside_one_message_each_way(tmp_path: Path) -> None:
    world = World(tmp_path)
    with world as (_, federation):
        check(total_of(federation, SMALL), SMALL)
    assert [world.air.calls[SERVER, name, Topic.POST] for name in VALUES] == [1, 1, 1]
    assert [world.air.calls[name, SERVER, Topic.DONE] for name in VALUES] == [1, 1, 1]
    assert not any(topic is Topic.PULL for _, _, topic in world.air.calls)
    assert spooled(tmp_path) == []


def test_large_tensors_are_pulled_and_no_message_holds_them(tmp_path: Path) -> None:
    world = World(tmp_path)
    size = encode(Question(adapter=LARGE), None).blob_size  # type: ignore[arg-type]
    with world as (_, federation):
        check(total_of(federation, LARGE), LARGE)
        # Parties hold the request's tensors on disk; the server holds nothing any more.
        assert not [path for path in spooled(tmp_path) if path.startswith(SERVER)]
        assert len(spooled(tmp_path)) == len(VALUES)
        check(total_of(federation, LARGE, 2), LARGE)
    for name in VALUES:
        assert max(world.air.sent[SERVER, name, Topic.POST], world.air.sent[name, SERVER, Topic.DONE]) < 10_000
        # Once in two rounds: the second time the party holds them.
        assert world.air.answered[name, SERVER, Topic.PULL] == size
        assert world.air.answered[SERVER, name, Topic.PULL] == 2 * size
    assert federation.ledger.of_round(1)["north", "up"] > size
    assert federation.ledger.of_round(1)["north", "down"] > size
    assert federation.ledger.of_round(2)["north", "down"] < 10_000


@pytest.mark.parametrize("adapter", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("seed", range(3))
def test_loss_doubles_and_delay_change_nothing(seed: int, adapter: Tensors, tmp_path: Path) -> None:
    air = Air(lost=0.2, doubled=0.3, delay_s=0.002, draw=random.Random(seed))
    world = World(tmp_path, air)
    with world as (_, federation):
        for round_ in (1, 2):
            check(total_of(federation, adapter, round_), adapter)
    assert [party.asked for party in world.parties.values()] == [2, 2, 2]


@pytest.mark.parametrize("adapter", [SMALL, LARGE], ids=["small", "large"])
def test_a_second_answer_is_not_counted(adapter: Tensors, tmp_path: Path) -> None:
    world = World(tmp_path, Air(doubled=1.0))
    with world as (made, federation):
        for round_ in (1, 2):
            check(total_of(federation, adapter, round_), adapter)
        assert made.late == []
    assert [party.asked for party in world.parties.values()] == [2, 2, 2]


def test_a_forged_answer_of_another_party_does_not_take_its_place(tmp_path: Path) -> None:
    world = World(tmp_path)

    def forge() -> None:
        # A party that cannot see the other's request cannot repeat its token.
        for _ in range(3):
            body = link_module.HEAD.pack(bytes(16), 0.0) + b"anything"
            world.air.carry("south", SERVER, Topic.DONE, body)
            world.air.carry("north", SERVER, Topic.DONE, body)

    world._options["north"] = {"before": forge}
    with world as (made, federation):
        check(total_of(federation, SMALL), SMALL)
        assert made.late == []


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_connection_that_is_cut_at_60_percent_goes_on_where_it_was(way: str, tmp_path: Path) -> None:
    adapter = {f"layer{number}": torch.full((1000, 1000), float(number)) for number in range(4)}
    key = (SERVER, "north", Topic.PULL) if way == "up" else ("north", SERVER, Topic.PULL)
    size = encode(Question(adapter=adapter), None).blob_size  # type: ignore[arg-type]
    back = [0.0]

    def bad(caller: str, peer: str, topic: Topic, body: Buffer) -> bool:
        if not back[0] and world.air.answered[key] > 0.6 * size:
            back[0] = time.monotonic() + 0.5
        return time.monotonic() < back[0]

    world = World(tmp_path, Air(bad=bad))
    with world as (_, federation):
        federation.expect(manifest_of(adapter))
        check(total_of(federation, adapter), adapter)
    assert back[0]
    assert size <= world.air.answered[key] <= 1.45 * size


def test_a_late_answer_is_refused_as_stale_and_never_used(tmp_path: Path) -> None:
    go_on = threading.Event()
    world = World(tmp_path, west={"before": lambda: go_on.wait(120) and None})
    with world as (made, federation):
        federation._timeout_s = 0.2
        check(total_of(federation, SMALL), SMALL, parties=("north", "south"), failures={"west": "ROUND_TIMEOUT"})
        assert made.late == []
        go_on.set()
        federation._timeout_s = 120
        check(total_of(federation, SMALL, 2), SMALL)
        assert made.late == ["west"]
        check(total_of(federation, LARGE, 3), LARGE)
        assert made.late == ["west"]
    assert federation.trained == {"north": 3, "south": 3, "west": 3}


def test_a_party_that_pulls_slowly_is_not_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "MAX_PIECE_BYTES", 2**16)

    def slow(caller: str, peer: str, topic: Topic, body: Buffer) -> bool:
        if topic is Topic.PULL and caller == "north":
            time.sleep(0.1)
        return False

    world = World(tmp_path, Air(bad=slow))
    with world as (_, federation):
        federation._timeout_s = 0.1
        started = time.monotonic()
        check(total_of(federation, LARGE), LARGE)
        # Longer than its time and the grace.
        assert time.monotonic() - started > 0.4


def spoilt(tensors: Tensors) -> Callable[[Frame], Frame]:
    def change(frame: Frame) -> Frame:
        answer = Summand(weight=1, counts={"n": 1.0}, tensors=tensors)
        return encode(answer, frame.envelope)

    return change


def with_nan(name: str, place: int) -> Tensors:
    tensors = {key: tensor.clone() for key, tensor in LARGE.items()}
    tensors[name].view(-1)[place] = float("nan")
    return tensors


BAD: dict[str, tuple[Callable[[Frame], Frame], str]] = {
    "NaN first": (spoilt(with_nan("layer0", 0)), "NONFINITE"),
    "NaN amid": (spoilt(with_nan("layer3", 31_000)), "NONFINITE"),
    "NaN last": (spoilt(with_nan("layer7", 59_999)), "NONFINITE"),
    "too large": (spoilt(LARGE | {"layer5": torch.full((200, 300), 3e38)}), "SUM_OVERFLOW"),
    "one missing": (spoilt({name: LARGE[name] for name in list(LARGE)[1:]}), "PAYLOAD_REFUSED"),
    "other shape": (spoilt(LARGE | {"layer5": torch.zeros(300, 200)}), "PAYLOAD_REFUSED"),
    "other dtype": (spoilt(LARGE | {"layer5": torch.zeros(200, 300).half()}), "PAYLOAD_REFUSED"),
    "other digest": (lambda frame: replace(frame, blob_digest="0" * 64), "PAYLOAD_REFUSED"),
    "shorter than announced": (lambda frame: replace(frame, blob_size=frame.blob_size + 1), "PAYLOAD_REFUSED"),
    "longer than announced": (lambda frame: replace(frame, blob_size=frame.blob_size - 1), "PAYLOAD_REFUSED"),
    "10 GB announced": (lambda frame: replace(frame, blob_size=10**10), "PAYLOAD_REFUSED"),
    "another run": (
        lambda frame: replace(frame, envelope=frame.envelope.model_copy(update={"run_id": "c" * 32})),
        "PAYLOAD_REFUSED",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_answer_in_a_file_is_checked_whole_before_any_of_it_is_added(name: str, tmp_path: Path) -> None:
    change, code = BAD[name]
    world = World(tmp_path, south={"change": change})
    with world as (_, federation):
        check(total_of(federation, LARGE), LARGE, parties=("north", "west"), failures={"south": code})
        assert not [path for path in spooled(tmp_path) if path.startswith(SERVER)]
        # The party is asked again in the next round.
        world.parties["south"].change = lambda frame: frame
        check(total_of(federation, LARGE, 2), LARGE)


@pytest.mark.parametrize("name", ["10 GB announced", "another run"])
def test_what_will_be_refused_is_not_pulled(name: str, tmp_path: Path) -> None:
    world = World(tmp_path, south={"change": BAD[name][0]})
    with world as (_, federation):
        total_of(federation, LARGE)
    assert world.air.calls[SERVER, "south", Topic.PULL] == 0
    assert world.air.calls[SERVER, "north", Topic.PULL] > 0


def test_10_gb_announced_are_pulled_where_the_cap_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, south={"change": BAD["10 GB announced"][0]})
    with world as (_, federation):
        monkeypatch.setattr(federation, "_max_bytes", 2**48)
        total_of(federation, LARGE)
    assert world.air.calls[SERVER, "south", Topic.PULL] > 0


def test_tensors_are_given_to_those_they_are_for_and_only_while_they_are_out(tmp_path: Path) -> None:
    seen: list[bytes] = []

    def bad(caller: str, peer: str, topic: Topic, body: Buffer) -> bool:
        if topic is Topic.PULL and peer == SERVER and not seen:
            seen.append(bytes(body))
            # While north pulls them: a stranger gets nothing, and nobody gets what is beyond the end.
            handler = world.air.handlers[SERVER, Topic.PULL]
            assert handler("north", body) and not handler("stranger", body)
            for offset, length in ((2**40, 10), (0, 2**31), (2**63, 2**20)):
                assert not handler(
                    "north", bytes(body[:32]) + offset.to_bytes(8, "little") + length.to_bytes(4, "little")
                )
            assert not handler("north", b"") and not handler("north", bytes(44))
        return False

    world = World(tmp_path, Air(bad=bad))
    with world as (_, federation):
        total_of(federation, LARGE)
        assert seen and not world.air.handlers[SERVER, Topic.PULL]("north", seen[0])


def test_a_party_that_gives_no_sign_of_life_pauses_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "LOST_S", 0.5)
    monkeypatch.setattr(link_module, "START_S", 0.5)
    world = World(tmp_path, Air(bad=lambda caller, peer, topic, body: "west" in (caller, peer)))
    with world as (_, federation), pytest.raises(RunPaused, match="west") as caught:
        total_of(federation, SMALL)
    assert caught.value.code == "PARTY_LOST"


def test_a_job_that_is_stopped_ends_the_exchange(tmp_path: Path) -> None:
    world = World(tmp_path, Air(bad=lambda caller, peer, topic, body: True))
    with world as (made, federation):
        made.link._aborted = lambda: True
        with pytest.raises(RunPaused, match="INTERRUPTED"):
            total_of(federation, SMALL)


def test_a_full_disk_at_the_server_pauses_the_run_and_does_not_blame_a_party(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    with world as (made, federation):

        def full(*_: object, **__: object) -> Blob:
            raise ResourceError("DISK_FULL", "cannot write")

        monkeypatch.setattr(made.link._spool, "pull", full)
        with pytest.raises(ResourceError):
            total_of(federation, LARGE)


@pytest.mark.parametrize(
    "told",
    [b"", b"[]", b"{}", b'{"stage": "training", "step": "x", "num_steps": 1}', b'{"stage": "training", "step": 1}'],
)
def test_a_malformed_sign_of_life_changes_nothing(told: bytes, tmp_path: Path) -> None:
    world = World(tmp_path)
    with world as (made, federation):
        before = made.link.seen["north"]
        with pytest.raises((ValueError, KeyError, TypeError)):
            world.air.handlers["server", Topic.BEAT]("north", told)
        assert made.link.seen["north"] == before
        check(total_of(federation, SMALL), SMALL)


def test_a_stage_that_is_none_is_not_repeated(tmp_path: Path) -> None:
    world = World(tmp_path)
    with world as (made, _):
        told = b'{"stage": "\\u001b[2J pay here", "step": 1, "num_steps": 2}'
        world.air.handlers["server", Topic.BEAT]("north", told)
        assert made.link.seen["north"].stage == "working"
