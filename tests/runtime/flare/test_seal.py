"""Signatures and replays between machines: each attack works with the defence off, and fails by name with it on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cryptography import x509
from fake_channel import Air, net

from fedllm.errors import CODES, PayloadError
from fedllm.identity.authority import create_authority
from fedllm.identity.keys import MIN_KEY_BITS, new_key, save_key
from fedllm.identity.requests import make_request
from fedllm.identity.signing import Roster, Signer
from fedllm.runs.checkpoint import Generations
from fedllm.runs.metrics import RowFile
from fedllm.runtime.base import SERVER, Done, Hello, Ready, Restore, Seal
from fedllm.runtime.federation import LinkedFederation
from fedllm.runtime.flare.channel import Topic
from fedllm.runtime.flare.link import enclosed, opened
from fedllm.runtime.flare.party import Refusal
from fedllm.runtime.freshness import Freshness
from fedllm.runtime.host import Blobs, PartyHost
from fedllm.runtime.local import InProcessLink
from fedllm.scenarios.base import Log, State, Summand
from fedllm.wire.blob import Buffer
from fedllm.wire.frame import Frame, Parcel, decode, encode, join, pack, split, unpack
from fedllm.wire.payload import Envelope, Failure, Payload, TensorMap, manifest_of

JOB, RUN = "a" * 64, "b" * 32
NAMES = ["north", "south", "west"]
ADAPTER = {"w": torch.ones(10)}


class Train(Payload):
    """Answered with `adapter + 1`; the party adds the adapter's first value to its state."""

    commits: ClassVar[bool] = True
    adapter: TensorMap


KINDS: dict[str, type[Payload]] = {cls.__name__: cls for cls in (Train, Summand, Failure)}


class Client:
    """Keeps one number."""

    def __init__(self, log: Log) -> None:
        self.value, self.round = 0.0, 0

    def handle(self, request: Payload, *, round_: int, deadline: float) -> Payload:
        assert isinstance(request, Train)
        self.value, self.round = self.value + float(request.adapter["w"][0]), round_
        return Summand(weight=1, counts={}, tensors={name: tensor + 1 for name, tensor in request.adapter.items()})

    def state(self) -> State:
        return State(self.round, {"value": torch.tensor([self.value])})

    def restore(self, state: State) -> None:
        self.value, self.round = float(state.tensors["value"][0]), state.round


@dataclass
class Member:
    """A host at a desk."""

    host: PartyHost

    def handle(self, parcel: Parcel, *, timeout_s: float) -> Parcel:
        return self.host.handle(parcel, timeout_s=timeout_s)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def seals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seal]:
    """Everybody's seal; `stranger` has a certificate of the authority and is not on the roster."""
    root = tmp_path_factory.mktemp("identities")
    authority = create_authority(root / "authority", project="trial", key=new_key(bits=MIN_KEY_BITS))
    signers, certificates = {}, {}
    for name in [SERVER, *NAMES, "stranger"]:
        (root / name).mkdir()
        key = new_key(bits=MIN_KEY_BITS)
        save_key(key, root / name / "key.pem")
        kind: Any = "server" if name == SERVER else "party"
        host = "127.0.0.1" if name == SERVER else None
        pem = authority.sign_request(make_request(root / name, name).read_bytes(), kind=kind, name=name, host=host)
        signers[name], certificates[name] = Signer(key), x509.load_pem_x509_certificate(pem)
    roster = Roster({name: certificates[name] for name in [SERVER, *NAMES]})
    return {name: Seal(signer.sign, roster.verify) for name, signer in signers.items()}


def host_of(folder: Path, name: str, seal: Seal | None, fresh: Freshness | None = None) -> PartyHost:
    def ready(rounds: list[int]) -> Ready:
        digests = dict.fromkeys(("base_digest", "tokenizer_digest", "template_digest", "common_digest"), "")
        return Ready(**digests, manifest={}, versions={}, rounds=rounds)

    own = folder / name
    own.mkdir(exist_ok=True)
    return PartyHost(
        party=name,
        job_digest=JOB,
        kinds=KINDS,
        open_client=Client,
        ready=ready,
        states=Generations(own / "states", name, JOB, RUN, keep=3),
        rows=RowFile(own / "metrics.jsonl"),
        blobs=Blobs({}),
        seal=seal,
        fresh=fresh or Freshness(own / "epoch.json"),
    )


def message(payload: Payload, sequence: int, seal: Seal | None, *, to: str = "north", **changes: Any) -> Parcel:
    values = {"job_digest": JOB, "run_id": RUN, "round": 1, "sequence": sequence, "sender": SERVER, "recipient": to}
    return pack(encode(payload, Envelope(**values | changes)), sign=seal.sign if seal else None)


def answer_of(host: PartyHost, parcel: Parcel) -> Payload:
    return decode(unpack(host.handle(parcel, timeout_s=9), max_bytes=2**20), {**KINDS, "Done": Done, "Ready": Ready})


def code_of(payload: Payload) -> str:
    return payload.code if isinstance(payload, Failure) else ""


HELLO, RESTORE = Hello(rounds=[0], trained={"north": [0]}), Restore(committed_round=0, trained=dict.fromkeys(NAMES, 0))
TRAIN = Train(adapter=ADAPTER)


_epochs = itertools.count()

# At the server: an answer that somebody on the way, or another party, has changed.

Forge = Callable[[Frame, dict[str, Seal]], Parcel]


def forged(frame: Frame, sign: Callable[[bytes], bytes] | None) -> Parcel:
    update = {name: torch.full_like(tensor, 1000.0) for name, tensor in ADAPTER.items()}
    return pack(encode(Summand(weight=1, counts={}, tensors=update), frame.envelope), sign=sign)


def with_signature_of(frame: Frame, seals: dict[str, Seal]) -> Parcel:
    return forged(frame, lambda text: frame.signature)


def with_other_weight(frame: Frame, seals: dict[str, Seal]) -> Parcel:
    return pack(replace(frame, fields=frame.fields | {"weight": 1000}), sign=lambda text: frame.signature)


FORGERS: dict[str, tuple[Forge, str]] = {
    "unsigned": (lambda frame, seals: forged(frame, None), "BAD_SIGNATURE"),
    "signed by another party": (lambda frame, seals: forged(frame, seals["west"].sign), "BAD_SIGNATURE"),
    "signed by the server": (lambda frame, seals: forged(frame, seals[SERVER].sign), "BAD_SIGNATURE"),
    "the true one's signature": (with_signature_of, "BAD_SIGNATURE"),
    "another weight": (with_other_weight, "BAD_SIGNATURE"),
}


def total_with(
    folder: Path, seals: dict[str, Seal], seal: Seal | None, forge: Forge | None = None, **others: Any
) -> Any:
    """Return the total of one round in which south's answer is replaced on its way."""
    air = Air()

    def on_the_way(caller: str, peer: str, topic: Topic, body: Buffer) -> bool:
        if (caller, topic) == ("south", Topic.DONE) and forge:
            token, _, parcel = opened(body)
            frame = unpack(parcel, max_bytes=2**20)
            if frame.kind == "Summand":
                changed, _ = enclosed(token, 0.0, forge(frame, seals))
                air.handlers[SERVER, Topic.DONE]("south", changed)
        return False

    air.bad = on_the_way
    openers = {
        name: lambda desk, name=name: others.get(name) or Member(host_of(folder, name, seals[name])) for name in NAMES
    }
    with net(folder, openers, air=air, seal=seal) as made:
        federation = made.federation(kinds=KINDS, job_digest=JOB, run_id=RUN, timeout_s=120)
        federation.start_at(next(_epochs))
        for reply in federation.ask(RESTORE, round_=0, to=NAMES):
            assert isinstance(reply.payload, Done) or reply.party in others
        return federation.total(TRAIN, round_=1, to=NAMES, manifest=manifest_of(ADAPTER))


def test_true_answers_are_summed(seals: dict[str, Seal], tmp_path: Path) -> None:
    total = total_with(tmp_path, seals, seals[SERVER])
    assert (total.parties, total.means["w"].unique().tolist()) == (tuple(NAMES), [2.0])


@pytest.mark.parametrize("name", FORGERS)
def test_a_forged_update_is_refused_by_name_and_the_round_goes_on(
    name: str, seals: dict[str, Seal], tmp_path: Path
) -> None:
    forge, code = FORGERS[name]
    total = total_with(tmp_path, seals, seals[SERVER], forge)
    assert (total.parties, total.failures) == (("north", "west"), {"south": code})
    assert total.means["w"].unique().tolist() == [2.0]


@pytest.mark.parametrize("name", FORGERS)
def test_a_forged_update_gets_into_the_sum_where_signatures_are_not_verified(
    name: str, seals: dict[str, Seal], tmp_path: Path
) -> None:
    blind = Seal(seals[SERVER].sign, lambda sender, text, signature: None)
    total = total_with(tmp_path, seals, blind, FORGERS[name][0])
    assert total.parties == tuple(NAMES)
    # South's word outweighs the others'.
    assert total.means["w"][0] > 300 or total.weight == 1002


def test_a_party_that_is_not_on_the_roster_is_refused_as_such(seals: dict[str, Seal], tmp_path: Path) -> None:
    def verify(sender: str, text: bytes, signature: bytes) -> None:
        seals[SERVER].verify("stranger" if sender == "south" else sender, text, signature)

    total = total_with(tmp_path, seals, Seal(seals[SERVER].sign, verify), None, south=Refusal("NOT_APPROVED"))
    assert total.failures == {"south": "NOT_ON_ROSTER"}


def test_the_code_of_a_party_that_takes_no_part_arrives_if_it_is_signed(seals: dict[str, Seal], tmp_path: Path) -> None:
    for seal, code in ((seals["south"], "NOT_APPROVED"), (None, "BAD_SIGNATURE"), (seals["west"], "BAD_SIGNATURE")):
        total = total_with(tmp_path, seals, seals[SERVER], None, south=Refusal("NOT_APPROVED", seal))
        assert (total.parties, total.failures) == (("north", "west"), {"south": code})


def test_an_answer_of_an_earlier_round_is_not_taken_for_one_of_this(seals: dict[str, Seal], tmp_path: Path) -> None:
    old: list[Parcel] = []

    def replay(frame: Frame, seals: dict[str, Seal]) -> Parcel:
        head = pack(frame, sign=lambda text: frame.signature)
        old.append(head)
        return old[0]

    air, codes = Air(), []

    def on_the_way(caller: str, peer: str, topic: Topic, body: Buffer) -> bool:
        if (caller, topic) == ("south", Topic.DONE):
            token, _, parcel = opened(body)
            frame = unpack(parcel, max_bytes=2**20)
            if frame.kind == "Summand":
                changed, _ = enclosed(token, 0.0, replay(frame, seals))
                air.handlers[SERVER, Topic.DONE]("south", changed)
        return False

    air.bad = on_the_way
    openers = {name: lambda desk, name=name: Member(host_of(tmp_path, name, seals[name])) for name in NAMES}
    with net(tmp_path, openers, air=air, seal=seals[SERVER]) as made:
        federation = made.federation(kinds=KINDS, job_digest=JOB, run_id=RUN, timeout_s=120)
        list(federation.ask(RESTORE, round_=0, to=NAMES))
        for round_ in (1, 2):
            total = federation.total(TRAIN, round_=round_, to=NAMES, manifest=manifest_of(ADAPTER))
            codes.append(total.failures)
    assert codes == [{}, {"south": "PAYLOAD_REFUSED"}]


# At the party: requests that are not the server's, or were once.


def begun(folder: Path, seals: dict[str, Seal], *, epoch: int = 0, fresh: Freshness | None = None) -> PartyHost:
    host = host_of(folder, "north", seals["north"], fresh)
    for count, request in enumerate((HELLO, RESTORE)):
        assert not code_of(answer_of(host, message(request, (epoch << 32) + count, seals[SERVER])))
    return host


@pytest.mark.parametrize("who", [None, "north", "south"])
def test_a_request_that_the_server_has_not_signed_is_refused_and_nothing_is_done(
    who: str | None, seals: dict[str, Seal], tmp_path: Path
) -> None:
    host = begun(tmp_path, seals)
    assert code_of(answer_of(host, message(TRAIN, 9, seals[who] if who else None))) == "BAD_SIGNATURE"
    assert host.states.present() == []
    # What it announced does not count: the server's own next message is taken.
    assert not code_of(answer_of(host, message(TRAIN, 9, seals[SERVER])))
    assert host.states.present() == [1]


def test_a_forged_request_is_obeyed_where_signatures_are_not_verified(seals: dict[str, Seal], tmp_path: Path) -> None:
    host = begun(tmp_path, seals)
    host.seal = Seal(seals["north"].sign, lambda sender, text, signature: None)
    assert isinstance(answer_of(host, message(TRAIN, 9, None)), Summand)


@pytest.mark.parametrize("changes", [{"round": 2}, {"sequence": 2**40}, {"run_id": "c" * 32}])
def test_a_header_changed_under_a_true_signature_is_refused(
    changes: dict[str, Any], seals: dict[str, Seal], tmp_path: Path
) -> None:
    host = begun(tmp_path, seals)
    frame = unpack(message(TRAIN, 9, seals[SERVER]), max_bytes=2**20)
    moved = replace(frame, envelope=frame.envelope.model_copy(update=changes))
    code = code_of(answer_of(host, pack(moved, sign=lambda text: frame.signature)))
    assert code == ("PAYLOAD_REFUSED" if "run_id" in changes else "BAD_SIGNATURE")


def test_every_bit_of_a_signed_message_counts(seals: dict[str, Seal], tmp_path: Path) -> None:
    host, data = begun(tmp_path, seals), join(message(TRAIN, 9, seals[SERVER]))
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        with suppress(PayloadError):
            assert code_of(answer_of(host, split(flipped))) in ("BAD_SIGNATURE", "PAYLOAD_REFUSED")
    assert host.states.present() == []
    assert isinstance(answer_of(host, split(data)), Summand)


def state_of(host: PartyHost) -> float:
    return float(host.states.load(1).tensors["value"][0])


def test_a_request_that_comes_again_is_refused_and_nothing_is_done(seals: dict[str, Seal], tmp_path: Path) -> None:
    host, again = begun(tmp_path, seals), message(TRAIN, 9, seals[SERVER])
    assert isinstance(answer_of(host, again), Summand)
    for parcel in (again, message(TRAIN, 8, seals[SERVER]), message(RESTORE, 1, seals[SERVER])):
        assert code_of(answer_of(host, parcel)) == "REPLAYED"
    assert state_of(host) == 1.0


def test_a_request_that_comes_again_is_obeyed_where_numbers_are_not_looked_at(
    seals: dict[str, Seal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, again = begun(tmp_path, seals), message(TRAIN, 9, seals[SERVER])
    monkeypatch.setattr(Freshness, "take", lambda self, sequence, party: None)
    for _ in range(2):
        assert isinstance(answer_of(host, again), Summand)
    assert state_of(host) == 2.0


def test_what_was_recorded_before_a_restart_is_refused_after_it(seals: dict[str, Seal], tmp_path: Path) -> None:
    recorded = [
        message(request, (5 << 32) + count, seals[SERVER]) for count, request in enumerate((HELLO, RESTORE, TRAIN))
    ]
    host = begun(tmp_path, seals, epoch=5)
    assert isinstance(answer_of(host, recorded[2]), Summand)
    host = host_of(tmp_path, "north", seals["north"])
    assert [code_of(answer_of(host, parcel)) for parcel in recorded] == ["REPLAYED"] * 3
    assert (host.client, state_of(host)) == (None, 1.0)
    begun(tmp_path, seals, epoch=6)


def test_a_recorded_run_is_obeyed_again_after_a_restart_that_forgets(seals: dict[str, Seal], tmp_path: Path) -> None:
    begun(tmp_path, seals, epoch=5, fresh=Freshness())
    host = begun(tmp_path, seals, epoch=5, fresh=Freshness())
    assert host.client is not None


def test_a_forged_number_far_ahead_does_not_lock_the_server_out(seals: dict[str, Seal], tmp_path: Path) -> None:
    host = host_of(tmp_path, "north", seals["north"])
    assert code_of(answer_of(host, message(HELLO, (2**31) << 32, seals["south"]))) == "BAD_SIGNATURE"
    assert not (tmp_path / "north" / "epoch.json").exists()
    begun(tmp_path, seals, epoch=1)


def test_a_second_sending_of_lost_tensors_is_no_replay(seals: dict[str, Seal], tmp_path: Path) -> None:
    host = host_of(tmp_path, "north", None)
    federation = LinkedFederation(InProcessLink({"north": host}), kinds=KINDS, job_digest=JOB, run_id=RUN, timeout_s=9)
    federation.start_at(7)
    list(federation.ask(RESTORE, round_=0, to=["north"]))
    for round_ in (1, 2):
        host.blobs.forget()
        total = federation.total(TRAIN, round_=round_, to=["north"], manifest=manifest_of(ADAPTER))
        assert (total.parties, total.failures) == (("north",), {})


def test_the_codes_of_refusals_are_known_to_every_version() -> None:
    assert {"BAD_SIGNATURE", "NOT_ON_ROSTER", "REPLAYED", "STALE_ROUND"} <= set(CODES)
