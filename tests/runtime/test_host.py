"""A party's side: lineage, the party's boundary, and state that never runs ahead of what was saved."""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fedllm.errors import PayloadError, RunFailed
from fedllm.runs.checkpoint import Generations
from fedllm.runs.metrics import RowFile
from fedllm.runtime.base import Done, Hello, Ready, Restore
from fedllm.runtime.host import Blobs, PartyHost
from fedllm.scenarios.base import Log, State
from fedllm.wire.blob import FileBlob, whole
from fedllm.wire.frame import Frame, Parcel, decode, encode, join, pack, split, unpack
from fedllm.wire.payload import Envelope, Failure, Payload, TensorMap

JOB, RUN = "a" * 64, "b" * 32


class Work(Payload):
    """Trains: adds `amount` to the party's state; fails if told to."""

    commits: ClassVar[bool] = True
    amount: float
    error: str = ""
    adapter: TensorMap


class Look(Payload):
    """Asks for the state's value and changes nothing."""


class Value(Payload):
    """The state's value."""

    value: float


KINDS: dict[str, type[Payload]] = {cls.__name__: cls for cls in (Work, Look, Value, Failure)}


class Client:
    """Keeps one number."""

    def __init__(self, log: Log) -> None:
        self.log, self.value, self.round = log, 0.0, 0

    def handle(self, request: Payload, *, round_: int, deadline: float) -> Payload:
        if isinstance(request, Work):
            self.value += request.amount
            self.log(round_, "train", {"value": self.value})
            if request.error == "known":
                raise RunFailed("NONFINITE", "secret prompt", where="secret place")
            if request.error:
                raise ZeroDivisionError("secret prompt")
            self.round = round_
        return Value(value=self.value)

    def state(self) -> State:
        return State(self.round, {"value": torch.tensor([self.value])})

    def restore(self, state: State) -> None:
        self.value, self.round = float(state.tensors["value"][0]), state.round


@pytest.fixture
def host(tmp_path: Path) -> PartyHost:
    return host_in(tmp_path)


def host_in(folder: Path) -> PartyHost:
    def ready(rounds: list[int]) -> Ready:
        digests = dict.fromkeys(("base_digest", "tokenizer_digest", "template_digest", "common_digest"), "")
        return Ready(**digests, manifest={}, versions={}, rounds=rounds)

    return PartyHost(
        party="north",
        job_digest=JOB,
        kinds=KINDS,
        open_client=Client,
        ready=ready,
        states=Generations(folder / "states", "north", JOB, RUN, keep=3),
        rows=RowFile(folder / "metrics.jsonl"),
        blobs=Blobs({}),
    )


_numbers = itertools.count()


def envelope_of(**changes: Any) -> Envelope:
    values = {"job_digest": JOB, "run_id": RUN, "round": 1, "sender": "server", "recipient": "north"}
    return Envelope(**{"sequence": next(_numbers)} | values | changes)


def message(payload: Payload, *, omit: bool = False, **envelope: Any) -> Parcel:
    return pack(encode(payload, envelope_of(**envelope)), omit_blob=omit)


def answer(host: PartyHost, payload: Payload, **options: Any) -> Payload:
    parcel = host.handle(message(payload, **options), timeout_s=60)
    return decode(unpack(parcel, max_bytes=2**20), KINDS | {"Ready": Ready, "Done": Done})


def code(payload: Payload) -> str:
    assert isinstance(payload, Failure)
    return payload.code


def value(payload: Payload) -> float:
    assert isinstance(payload, Value), payload
    return payload.value


def begin(host: PartyHost, *, trained: int = 0, committed: int = 0) -> None:
    assert isinstance(answer(host, Restore(committed_round=committed, trained={"north": trained})), Done)


def work(amount: float, error: str = "") -> Work:
    return Work(amount=amount, error=error, adapter={"w": torch.full((4,), amount)})


@pytest.mark.parametrize(
    "envelope",
    [
        {"job_digest": "c" * 64},
        {"run_id": "c" * 32},
        {"sender": "south"},
        {"recipient": "south"},
    ],
)
def test_a_message_of_another_job_run_or_party_is_refused_and_changes_nothing(
    envelope: dict[str, Any], host: PartyHost
) -> None:
    begin(host)
    assert code(answer(host, work(1.0), **envelope)) == "PAYLOAD_REFUSED"
    assert code(answer(host, Restore(committed_round=0, trained={"north": 0}), **envelope)) == "PAYLOAD_REFUSED"
    assert value(answer(host, Look())) == 0.0
    assert host.states.present() == []


def test_the_reply_carries_the_request_s_lineage(host: PartyHost) -> None:
    begin(host)
    reply = unpack(host.handle(message(Look(), round=4, sequence=2**40), timeout_s=60), max_bytes=2**20).envelope
    assert (reply.round, reply.sequence, reply.sender, reply.recipient) == (4, 2**40, "north", "server")


def test_every_truncated_message_is_refused(host: PartyHost) -> None:
    begin(host)
    data = join(message(work(1.0)))
    for length in range(0, len(data), 7):
        with pytest.raises(PayloadError):
            host.handle(split(data[:length]), timeout_s=60)
    assert host.states.present() == []


def test_a_message_with_one_bit_flipped_in_its_tensors_is_refused(host: PartyHost) -> None:
    begin(host)
    data = bytearray(join(message(work(1.0))))
    data[-1] ^= 1
    with pytest.raises(PayloadError):
        host.handle(split(data), timeout_s=60)


def test_a_request_before_the_handshake_is_refused(host: PartyHost) -> None:
    assert code(answer(host, Look())) == "PAYLOAD_REFUSED"


@pytest.mark.parametrize(("error", "expected"), [("known", "NONFINITE"), ("unknown", "PARTY_FAILED")])
def test_only_a_code_leaves_the_party_when_it_fails(
    error: str, expected: str, host: PartyHost, caplog: pytest.LogCaptureFixture
) -> None:
    begin(host)
    with caplog.at_level(logging.CRITICAL):
        parcel = host.handle(message(work(1.0, error)), timeout_s=60)
    assert b"secret" not in join(parcel)
    assert b"ZeroDivision" not in join(parcel)
    assert code(decode(unpack(parcel, max_bytes=2**20), KINDS)) == expected


@pytest.mark.parametrize("error", ["known", "unknown"])
def test_a_failed_round_leaves_the_state_of_the_last_saved_one(error: str, host: PartyHost) -> None:
    begin(host)
    answer(host, work(1.0), round=1)
    answer(host, work(5.0, error), round=2)
    assert value(answer(host, Look(), round=2)) == 1.0
    assert value(answer(host, work(2.0), round=3)) == 3.0
    assert host.states.present() == [3, 1]


def test_a_state_that_cannot_be_saved_is_a_failed_round(host: PartyHost, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(host)
    answer(host, work(1.0), round=1)
    with monkeypatch.context() as patch:
        patch.setattr(Generations, "save", lambda self, state: (_ for _ in ()).throw(OSError("full")))
        assert code(answer(host, work(5.0), round=2)) == "PARTY_FAILED"
    assert value(answer(host, Look(), round=2)) == 1.0


def test_the_state_is_on_disk_before_the_answer_leaves(host: PartyHost, tmp_path: Path) -> None:
    begin(host)
    for number in (1, 2):
        answer(host, work(1.0), round=number)
        assert host_in(tmp_path).states.load(number).tensors["value"].tolist() == [float(number)]


def test_a_restarted_party_goes_on_from_the_round_that_the_server_committed(host: PartyHost, tmp_path: Path) -> None:
    begin(host)
    for number in (1, 2, 3):
        answer(host, work(1.0), round=number)
    again = host_in(tmp_path)
    hello = Hello(rounds=[2, 1], trained={"north": [2, 1]})
    ready = answer(again, hello)
    assert isinstance(ready, Ready)
    assert ready.rounds == [2, 1]
    begin(again, trained=2, committed=2)
    assert value(answer(again, Look(), round=3)) == 2.0
    # What came after the committed round is forgotten: state and rows.
    assert again.states.present() == [2, 1]
    assert {row["round"] for row in again.rows.read()} == {1, 2}


def test_a_party_says_which_rounds_it_cannot_go_on_from(host: PartyHost, tmp_path: Path) -> None:
    begin(host)
    for number in (1, 2):
        answer(host, work(1.0), round=number)
    path = tmp_path / "states" / "round-000002.ckpt"
    path.write_bytes(path.read_bytes()[:-1])
    ready = answer(host_in(tmp_path), Hello(rounds=[2, 1], trained={"north": [2, 1]}))
    assert isinstance(ready, Ready)
    assert ready.rounds == [1]
    # Never trained is a state that cannot be lost.
    ready = answer(host_in(tmp_path), Hello(rounds=[2, 1], trained={"north": [0, 0]}))
    assert isinstance(ready, Ready)
    assert ready.rounds == [2, 1]


def test_tensors_by_digest_are_those_of_the_last_message_and_are_forgotten_at_the_handshake(host: PartyHost) -> None:
    begin(host)
    assert value(answer(host, work(1.0), round=1)) == 1.0
    assert value(answer(host, work(1.0), round=2, omit=True)) == 2.0
    assert code(answer(host, work(7.0), round=3, omit=True)) == "BLOB_MISSING"
    answer(host, Hello(rounds=[0], trained={}))
    assert code(answer(host, work(1.0), round=3, omit=True)) == "BLOB_MISSING"
    assert value(answer(host, work(1.0), round=3)) == 3.0


def test_rows_name_the_party_and_the_round(host: PartyHost) -> None:
    begin(host)
    answer(host, work(1.0), round=1)
    rows = host.rows.read()
    assert {(row["party"], row["round"]) for row in rows} == {("north", 1)}
    assert {(row["split"], row["name"]) for row in rows} == {("train", "value"), (None, "seconds_compute")}


class Fetched:
    """Stands for the server that a party pulls tensors from; each comes in a file."""

    def __init__(self, folder: Path, frame: Frame) -> None:
        assert frame.blob is not None
        self.path, self.data, self.calls = folder / "pulled", bytes(whole(frame.blob)), 0

    def __call__(self, frame: Frame) -> FileBlob:
        self.calls += 1
        self.path.write_bytes(self.data)
        return FileBlob(self.path, frame.blob_digest, frame.blob_size)


def test_tensors_that_do_not_come_along_are_fetched_once_and_kept_in_their_file(tmp_path: Path) -> None:
    host = host_in(tmp_path)
    host.fetch = fetched = Fetched(tmp_path, encode(work(2.0), envelope_of()))
    begin(host)
    for round_ in (1, 2):
        assert value(answer(host, work(2.0), round=round_, omit=True)) == 2.0 * round_
    assert fetched.calls == 1 and fetched.path.exists()
    # Other tensors take their place.
    assert value(answer(host, work(5.0), round=3)) == 9.0
    assert not fetched.path.exists()


def test_tensors_far_larger_than_the_adapter_are_refused_and_not_fetched(tmp_path: Path) -> None:
    host = host_in(tmp_path)
    frame = encode(work(2.0), envelope_of())
    host.fetch = fetched = Fetched(tmp_path, frame)
    begin(host)
    for size, calls in ((10**10, 0), (2**24 + 1, 0), (frame.blob_size, 1)):
        host.handle(pack(replace(frame, envelope=envelope_of(), blob_size=size), omit_blob=True), timeout_s=60)
        assert fetched.calls == calls


def test_a_request_may_be_longer_by_what_the_rules_of_the_job_add(tmp_path: Path) -> None:
    host = host_in(tmp_path)
    host.room = 1000
    frame = encode(work(2.0), envelope_of())
    host.fetch = fetched = Fetched(tmp_path, frame)
    begin(host)
    for size, calls in ((2**24 + 1001, 0), (2**24 + 1000, 1)):
        host.handle(pack(replace(frame, envelope=envelope_of(), blob_size=size), omit_blob=True), timeout_s=60)
        assert fetched.calls == calls


def test_the_time_to_answer_begins_when_the_tensors_are_there(tmp_path: Path) -> None:
    host = host_in(tmp_path)
    deadlines: list[float] = []

    class Timed(Client):
        def handle(self, request: Payload, *, round_: int, deadline: float) -> Payload:
            deadlines.append(deadline)
            return super().handle(request, round_=round_, deadline=deadline)

    fetched, came = Fetched(tmp_path, encode(work(2.0), envelope_of())), []

    def slow(frame: Frame) -> FileBlob:
        time.sleep(0.2)
        came.append(time.monotonic())
        return fetched(frame)

    host.fetch, host.open_client = slow, Timed
    begin(host)
    answer(host, work(2.0), omit=True)
    assert deadlines[0] >= came[0] + 60
