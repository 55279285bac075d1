"""`ask` and `total` at the server: what a party may send, what becomes of it, and how many bytes it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from fedllm.runtime.base import Link, Wanted
from fedllm.runtime.federation import LinkedFederation
from fedllm.scenarios.base import Summand
from fedllm.wire.blob import Blob
from fedllm.wire.frame import Parcel, decode, encode, join, pack, split, unpack, with_blob
from fedllm.wire.patch import DownSettings, Patched, applied, next_sent
from fedllm.wire.payload import Envelope, Failure, Payload, TensorMap, Tensors, manifest_of

JOB, RUN = "a" * 64, "b" * 32


class Question(Payload):
    """A request with tensors."""

    commits: ClassVar[bool] = True
    adapter: TensorMap


class Note(Payload):
    """An answer that is no summand."""


KINDS: dict[str, type[Payload]] = {cls.__name__: cls for cls in (Question, Note, Summand, Failure)}
ADAPTER = {"w": torch.ones(3), "v": torch.zeros(2, 2)}
MANIFEST = manifest_of(ADAPTER)
Answer = Callable[[Parcel], Parcel | None]


class ScriptedLink(Link):
    """Parties that answer as they are told; keeps what it carried."""

    def __init__(self, answers: Mapping[str, Answer], *, order: tuple[str, ...] = ()) -> None:
        self._answers, self._order = dict(answers), order or tuple(answers)
        self.carried: list[tuple[str, int, int]] = []

    @property
    def parties(self) -> tuple[str, ...]:
        return tuple(self._answers)

    def exchange(
        self, messages: Mapping[str, Parcel], *, timeout_s: float, wanted: Wanted
    ) -> Iterator[tuple[str, Parcel | None]]:
        for party in self._order:
            if party in messages:
                answer = self._answers[party](messages[party])
                self.carried.append((party, messages[party].num_bytes, answer.num_bytes if answer else 0))
                yield party, answer

    def close(self) -> None:
        pass


def summand(value: float, *, weight: int = 1, **changes: Any) -> Summand:
    tensors = {name: torch.full_like(tensor, value) for name, tensor in ADAPTER.items()}
    return Summand(**{"weight": weight, "counts": {"tokens": 2.0}, "tensors": tensors} | changes)


def replying(payload: Payload, **envelope: Any) -> Answer:
    def answer(parcel: Parcel) -> Parcel:
        reply = unpack(parcel, max_bytes=2**30).envelope.reply()
        return pack(encode(payload, reply.model_copy(update=envelope)))

    return answer


def federation_of(link: ScriptedLink) -> LinkedFederation:
    federation = LinkedFederation(link, kinds=KINDS, job_digest=JOB, run_id=RUN, timeout_s=5)
    federation.expect(MANIFEST)
    return federation


def total_of(answers: Mapping[str, Answer], **options: Any) -> Any:
    federation = federation_of(ScriptedLink(answers, **options))
    return federation.total(Question(adapter=ADAPTER), round_=2, to=federation.parties, manifest=MANIFEST)


def test_the_total_is_the_weighted_mean_and_names_who_is_in_it() -> None:
    total = total_of({"north": replying(summand(1.0, weight=3)), "south": replying(summand(5.0, weight=1))})
    assert total.parties == ("north", "south")
    assert (total.weight, total.counts, total.failures) == (4, {"tokens": 4.0}, {})
    assert {name: tensor.unique().tolist() for name, tensor in total.means.items()} == {"w": [2.0], "v": [2.0]}


def test_another_order_of_answers_gives_the_same_total() -> None:
    answers = {f"p{i}": replying(summand(0.1 * i - 0.37, weight=i + 1)) for i in range(4)}
    totals = [total_of(answers), total_of(answers, order=("p3", "p1", "p0", "p2"))]
    assert totals[0].parties == totals[1].parties == ("p0", "p1", "p2", "p3")
    for name in ADAPTER:
        assert torch.equal(totals[0].means[name], totals[1].means[name])


def with_tensors(**tensors: torch.Tensor) -> Payload:
    return summand(1.0, tensors=tensors)


def summand_like(payload: Payload, **fields: Any) -> Answer:
    """Answer with fields that the class itself would not let through."""

    def answer(parcel: Parcel) -> Parcel:
        frame = encode(payload, unpack(parcel, max_bytes=2**30).envelope.reply())
        return pack(replace(frame, fields=frame.fields | fields))

    return answer


def joined(parcel: Parcel | None) -> bytes:
    assert parcel is not None
    return join(parcel)


def beheaded(parcel: Parcel | None) -> Parcel:
    assert parcel is not None
    return Parcel(parcel.head)


def with_others(parcel: Parcel | None) -> Parcel:
    assert parcel is not None
    return Parcel(parcel.head, encode(summand(2.0), ENVELOPE).blob)


ENVELOPE = Envelope(job_digest=JOB, run_id=RUN, round=1, sequence=2, sender="server", recipient="north")
NAN = torch.tensor([1.0, float("nan"), 1.0])
BAD: dict[str, tuple[Answer, str]] = {
    "no answer": (lambda parcel: None, "ROUND_TIMEOUT"),
    "empty": (lambda parcel: Parcel(b""), "PAYLOAD_REFUSED"),
    "noise": (lambda parcel: Parcel(b"\x80\x04pickle?"), "PAYLOAD_REFUSED"),
    "cut": (lambda parcel: split(joined(replying(summand(1.0))(parcel))[:-1]), "PAYLOAD_REFUSED"),
    "no tensors": (lambda parcel: beheaded(replying(summand(1.0))(parcel)), "PAYLOAD_REFUSED"),
    "tensors of another": (lambda parcel: with_others(replying(summand(1.0))(parcel)), "PAYLOAD_REFUSED"),
    "an echo": (lambda parcel: parcel, "PAYLOAD_REFUSED"),
    "too long": (replying(with_tensors(w=torch.zeros(2**23))), "PAYLOAD_REFUSED"),
    "another job": (replying(summand(1.0), job_digest="c" * 64), "PAYLOAD_REFUSED"),
    "another run": (replying(summand(1.0), run_id="c" * 32), "PAYLOAD_REFUSED"),
    "an older round": (replying(summand(1.0), round=1), "PAYLOAD_REFUSED"),
    "an older request": (replying(summand(1.0), sequence=7), "PAYLOAD_REFUSED"),
    "another's name": (replying(summand(1.0), sender="north"), "PAYLOAD_REFUSED"),
    "another's mail": (replying(summand(1.0), recipient="north"), "PAYLOAD_REFUSED"),
    "no summand": (replying(Note()), "PAYLOAD_REFUSED"),
    "a request": (replying(Question(adapter=ADAPTER)), "PAYLOAD_REFUSED"),
    "NaN": (replying(with_tensors(w=NAN, v=ADAPTER["v"])), "NONFINITE"),
    "infinity": (replying(with_tensors(w=NAN.nan_to_num(float("inf")), v=ADAPTER["v"])), "NONFINITE"),
    "a tensor missing": (replying(with_tensors(w=ADAPTER["w"])), "PAYLOAD_REFUSED"),
    "a tensor more": (replying(with_tensors(**ADAPTER, x=torch.ones(3))), "PAYLOAD_REFUSED"),
    "another shape": (replying(with_tensors(w=torch.ones(4), v=ADAPTER["v"])), "PAYLOAD_REFUSED"),
    "another dtype": (replying(with_tensors(w=torch.ones(3).double(), v=ADAPTER["v"])), "PAYLOAD_REFUSED"),
    "too large": (replying(summand(3e38)), "SUM_OVERFLOW"),
    "weight 0": (summand_like(summand(1.0), weight=0), "PAYLOAD_REFUSED"),
    "weight -1": (summand_like(summand(1.0), weight=-1), "PAYLOAD_REFUSED"),
    "weight 1e300": (summand_like(summand(1.0), weight=1e300), "PAYLOAD_REFUSED"),
    "weight 10**30": (summand_like(summand(1.0), weight=10**30), "PAYLOAD_REFUSED"),
    "weight in text": (summand_like(summand(1.0), weight="3"), "PAYLOAD_REFUSED"),
    "a huge count": (summand_like(summand(1.0), counts={"tokens": 1e300}), "SUM_OVERFLOW"),
    "a failure": (replying(Failure(code="NONFINITE")), "NONFINITE"),
    "a failure of its own words": (replying(Failure(code="THE_ANSWER_IS_42")), "PARTY_FAILED"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_party_may_not_send_is_left_out_by_code_and_the_others_are_summed(name: str) -> None:
    answer, code = BAD[name]
    total = total_of({"north": replying(summand(1.0)), "bad": answer, "south": replying(summand(3.0))})
    assert total.failures == {"bad": code}
    assert total.parties == ("north", "south")
    assert (total.weight, total.counts) == (2, {"tokens": 4.0})
    assert total.means["w"].tolist() == [2.0] * 3


@pytest.mark.parametrize("name", BAD)
def test_what_a_party_may_not_send_is_refused_when_it_comes_first_and_alone_too(name: str) -> None:
    answer, code = BAD[name]
    total = total_of({"bad": answer})
    assert (total.failures, total.parties, total.means) == ({"bad": code}, (), {})


class Holder:
    """A party that keeps tensors, or forgets them, and answers from what it decoded."""

    def __init__(self, *, forgets: bool = False) -> None:
        self.held: dict[str, Blob] = {}
        self.forgets = forgets
        self.got_blob: list[bool] = []

    def __call__(self, parcel: Parcel) -> Parcel:
        frame = unpack(parcel, max_bytes=2**30)
        self.got_blob.append(parcel.blob is not None)
        if self.forgets:
            self.held.clear()
        if not frame.blob and frame.blob_digest not in self.held:
            return pack(encode(Failure(code="BLOB_MISSING"), frame.envelope.reply()))
        whole = with_blob(frame, self.held)
        assert whole.blob is not None
        self.held = {whole.blob_digest: whole.blob}
        question = decode(whole, KINDS)
        assert isinstance(question, Question)
        return pack(encode(summand(float(question.adapter["w"][0])), frame.envelope.reply()))


def test_tensors_that_a_party_holds_are_not_sent_again() -> None:
    party = Holder()
    federation = federation_of(ScriptedLink({"north": party}))
    for round_ in (1, 2):
        total = federation.total(Question(adapter=ADAPTER), round_=round_, to=["north"], manifest=MANIFEST)
        assert total.means["w"].tolist() == [1.0] * 3
    other = {name: tensor + 1 for name, tensor in ADAPTER.items()}
    total = federation.total(Question(adapter=other), round_=3, to=["north"], manifest=MANIFEST)
    assert total.means["w"].tolist() == [2.0] * 3
    assert party.got_blob == [True, False, True]


def test_a_party_that_lost_the_tensors_gets_them_again_and_is_counted_once() -> None:
    party, other = Holder(forgets=True), Holder()
    federation = federation_of(ScriptedLink({"north": party, "south": other}))
    for round_ in (1, 2):
        total = federation.total(Question(adapter=ADAPTER), round_=round_, to=["north", "south"], manifest=MANIFEST)
        assert (total.parties, total.weight, total.failures) == (("north", "south"), 2, {})
    assert party.got_blob == [True, False, True]
    assert other.got_blob == [True, False]


CODEC = DownSettings(name="int8", block_size=64).codec
WIDE = {"w": torch.linspace(0, 1, 1000)}


class Patching(Holder):
    """A holder that takes changes too."""

    def __call__(self, parcel: Parcel) -> Parcel:
        frame = unpack(parcel, max_bytes=2**30)
        if not frame.patch_of:
            return super().__call__(parcel)
        self.got_blob.append(False)
        old = self.held.get(frame.patch_of)
        if self.forgets or old is None or frame.patch is None:
            return pack(encode(Failure(code="BLOB_MISSING"), frame.envelope.reply()))
        self.held = {frame.blob_digest: applied(old, frame.patch, CODEC, digest=frame.blob_digest)}
        return pack(encode(summand(1.0, tensors={}), frame.envelope.reply()))


def changed_questions(count: int) -> Iterator[Question]:
    now, lost, held = WIDE, Tensors(), encode(Question(adapter=WIDE), ENVELOPE).blob_digest
    yield Question(adapter=now)
    for number in range(1, count):
        sent = next_sent(now, {"w": now["w"] + 0.1 * number}, lost, names=["w"], codec=CODEC)
        question = Question(adapter=Patched(sent.tensors, sent.change, held))
        yield question
        now, lost, held = sent.tensors, sent.lost, encode(question, ENVELOPE).blob_digest


def test_who_holds_what_a_change_is_of_gets_the_change_and_others_the_whole() -> None:
    always, forgets, late = Patching(), Patching(forgets=True), Patching()
    link = ScriptedLink({"always": always, "forgets": forgets, "late": late})
    federation = federation_of(link)
    for round_, question in enumerate(changed_questions(4)):
        asked = ["always", "forgets"] + ["late"] * (round_ != 1)
        total = federation.total(question, round_=round_, to=asked, manifest={})
        # Whose answer is of another shape got the whole and answered it.
        assert set(total.failures.values()) <= {"PAYLOAD_REFUSED"}
    assert always.got_blob == [True, False, False, False]
    assert forgets.got_blob == [True, False, True, False, True, False, True]
    assert late.got_blob == [True, True, False]
    assert always.held.keys() == forgets.held.keys() == late.held.keys()
    shorter = [federation.ledger.saved_in(round_) for round_ in range(4)]
    assert [sorted(found) for found in shorter] == [[], ["always"], ["always"], ["always", "late"]]
    down = [federation.ledger.of_round(round_)["always", "down"] for round_ in range(4)]
    assert down[1] < 0.5 * down[0]
    # The header says what the change is of.
    assert down[0] == pytest.approx(down[1] + shorter[1]["always"], abs=250)


def test_an_answer_that_says_it_is_a_change_is_refused() -> None:
    def answer(parcel: Parcel) -> Parcel:
        patched = Patched(ADAPTER, {"w#values": torch.ones(1)}, "a" * 64)
        return pack(encode(Question(adapter=patched), unpack(parcel, max_bytes=2**30).envelope.reply()))

    assert total_of({"bad": answer}).failures == {"bad": "PAYLOAD_REFUSED"}


def test_a_party_that_claims_to_miss_everything_fails_and_does_not_loop() -> None:
    total = total_of({"bad": replying(Failure(code="BLOB_MISSING"))})
    assert total.failures == {"bad": "BLOB_MISSING"}


def test_the_ledger_counts_the_bytes_that_travelled() -> None:
    link = ScriptedLink({"north": Holder(forgets=True), "south": Holder(), "west": lambda parcel: None})
    federation = federation_of(link)
    for round_ in (1, 2):
        federation.total(Question(adapter=ADAPTER), round_=round_, to=federation.parties, manifest=MANIFEST)
    counted = {
        way: sum(n for at in (1, 2) for (p, w), n in federation.ledger.of_round(at).items() if (p, w) == ("north", way))
        for way in ("up", "down")
    }
    carried = [(down, up) for party, down, up in link.carried if party == "north"]
    assert len(carried) == 3
    assert counted == {"down": sum(down for down, _ in carried), "up": sum(up for _, up in carried)}
    assert ("west", "up") not in federation.ledger.of_round(1)
    assert federation.ledger.of_round(3) == {}


def test_a_party_is_remembered_as_trained_only_if_its_answer_could_be_used() -> None:
    federation = federation_of(
        ScriptedLink({"north": replying(summand(1.0)), "bad": replying(Failure(code="NONFINITE"))})
    )
    federation.total(Question(adapter=ADAPTER), round_=4, to=federation.parties, manifest=MANIFEST)
    assert federation.trained == {"north": 4, "bad": 0}


def test_the_answer_of_another_request_of_the_same_round_is_not_taken() -> None:
    old: list[Parcel | None] = []

    def replay(parcel: Parcel) -> Parcel | None:
        old.append(replying(summand(1.0))(parcel))
        return old[0]

    federation = federation_of(ScriptedLink({"north": replay}))
    totals = [federation.total(Question(adapter=ADAPTER), round_=1, to=["north"], manifest=MANIFEST) for _ in range(2)]
    assert totals[0].parties == ("north",)
    assert totals[1].failures == {"north": "PAYLOAD_REFUSED"}


def test_an_envelope_s_reply_goes_back_to_where_it_came_from() -> None:
    reply = ENVELOPE.reply()
    assert (reply.sender, reply.recipient, reply.round, reply.sequence) == ("north", "server", 1, 2)
