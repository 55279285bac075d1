"""FedOST: parties tune the outer layers of an emulator together; the owner of the whole model plugs them in.

Source: Fan et al. 2023, arXiv:2310.10049, section 3.1 (FedOST); Xiao et al. 2023, arXiv:2302.04870 (Offsite-Tuning),
section 3; Kuang et al. 2024, arXiv:2309.00363 (FedOT). Differs: the adapter layers are averaged by FedHomoLLM's rounds,
with all of its rules, codecs and sums, and the owner is a party of its own that neither trains nor aggregates.

From the clients' side this is FedHomoLLM on a smaller base model, the package: its config says which layers can be
tuned. So its halves are FedHomoLLM's, and what is here is the owner.

1. FedHomoLLM's round among all parties but the owner. In it, every so many rounds, `Realign`: the owner corrects the
   emulator (`fedllm.scenarios.fedost_realign`), and the correction goes down with the adapter.
2. `Plug`, every so many rounds: the owner measures the emulator (OT-Emu) and its whole model (Plug) with the global
   adapter, on its probe set, and on the job's common test set.
3. After the last round, `Hand`: each side makes of the delivered adapter what the job says it gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import Field

from fedllm.aggregate.folded import split
from fedllm.errors import ModelError, PayloadError
from fedllm.evaluate.loss import LossSums, evaluate_examples
from fedllm.models.adapter import TunableModel
from fedllm.models.full import FullModel
from fedllm.scenarios.base import (
    ClientContext,
    ClientHalf,
    Decode,
    Federation,
    Manifests,
    Reply,
    RoundResult,
    Row,
    Scenario,
    ScenarioSettings,
    State,
    Summand,
    Total,
    as_it_is,
)
from fedllm.scenarios.fedhomollm import Server as AveragingServer
from fedllm.scenarios.fedhomollm import Settled
from fedllm.scenarios.fedhomollm import alone as alone_in_averaging
from fedllm.scenarios.fedhomollm_answer import answer as answer_in_averaging
from fedllm.scenarios.fedhomollm_client import Client as AveragingClient
from fedllm.scenarios.fedhomollm_messages import Evaluate, Initial, SendInitial, Train, private, select
from fedllm.scenarios.fedhomollm_rows import rows_of
from fedllm.scenarios.fedost_realign import (
    Realign,
    Realigned,
    check_correction,
    first_correction,
    realigned,
    rows_after,
)
from fedllm.scenarios.fedost_settings import Settings, clashes, sender, trainers
from fedllm.scenarios.fedost_trust import delivered, who_learns_what
from fedllm.wire.frame import check_finite, check_manifest
from fedllm.wire.payload import Manifest, Payload, TensorMap, Tensors

# Where the owner measured, as the split of a metric: the emulator, and the whole model.
EMULATOR, PLUGGED = "emulator", "plugged"


class Plug(Payload):
    """Server -> owner: measure the emulator, and the whole model, with this adapter."""

    adapter: TensorMap


class Plugged(Payload):
    """Owner -> server: losses in nats per target on its probe set, and on the common test set if there is one."""

    losses: dict[str, float] = Field(max_length=4)


class Hand(Payload):
    """Server -> a party, at the end: what was tuned, as of this round. It makes of it what the job says it gets."""

    adapter: TensorMap
    delivered: int


class Handed(Payload):
    """Party -> server: it has what it gets."""


class _Others:
    """The federation without its owner: what FedHomoLLM's server half talks to."""

    def __init__(self, federation: Federation, owner: str) -> None:
        self._federation, self._owner = federation, owner

    @property
    def parties(self) -> tuple[str, ...]:
        """All parties but the owner."""
        return tuple(party for party in self._federation.parties if party != self._owner)

    def ask(self, request: Payload, *, round_: int, to: Sequence[str]) -> Iterator[Reply]:
        """Yield each party's answer; see `Federation`."""
        return self._federation.ask(request, round_=round_, to=to)

    def total(
        self, request: Payload, *, round_: int, to: Sequence[str], manifest: Manifests, decode: Decode = as_it_is
    ) -> Total:
        """Return the sum of the answers; see `Federation`."""
        return self._federation.total(request, round_=round_, to=to, manifest=manifest, decode=decode)


class Server:
    """The server's half: FedHomoLLM's among the clients, and the owner beside it."""

    def __init__(self, settings: Settings, **rest: Any) -> None:
        self._settings = settings
        self._averaging = AveragingServer(settings, **rest)

    def start(self, federation: Federation) -> RoundResult:
        """Return the state of round 0: the initial adapter, evaluated and plugged in."""
        result = self._averaging.start(_Others(federation, self._settings.owner))
        return self._finished(federation, result)

    def round(self, federation: Federation, state: State) -> RoundResult:
        """Return the state after the next round."""
        others, settle = _Others(federation, self._settings.owner), partial(self._realigned, federation)
        result = self._averaging.round(others, state, settle=settle)
        return self._finished(federation, result)

    def final(self, state: State) -> tuple[Tensors, int]:
        """Return the adapter for the emulator and its round; no tensors where the clients do not get it."""
        tensors, number = self._averaging.final(state)
        return (tensors if self._settings.deliver_to_clients == "adapter" else {}), number

    def _finished(self, federation: Federation, result: RoundResult) -> RoundResult:
        """Return the result of a round with what the owner says to it, and hand over after the last one."""
        settings, state = self._settings, result.state
        if settings.owner not in federation.parties:
            # A yardstick: one party alone, or pooled data.
            return result
        every, is_last = settings.plug_every, state.round == settings.num_rounds
        if every and (state.round % every == 0 or is_last):
            result = self._plugged(federation, result)
        return self._handed(federation, result) if is_last else result

    def _realigned(self, federation: Federation, tensors: Tensors, number: int) -> Settled:
        """Return a round's tensors with the emulator's next correction beside the adapter, every so many rounds."""
        settings = self._settings
        every, is_last = settings.realign_every, number == settings.num_rounds
        if not every or number % every or is_last or settings.owner not in federation.parties:
            return Settled(tensors)
        for reply in federation.ask(Realign(adapter=tensors), round_=number, to=[settings.owner]):
            answer = reply.payload
            if not isinstance(answer, Realigned):
                return Settled(tensors, failures={settings.owner: getattr(answer, "code", "PAYLOAD_REFUSED")})
            if answer.correction:
                check_finite(answer.correction, sender=settings.owner)
                tensors = split(tensors)[0] | split(answer.correction)[1]
            return Settled(tensors, rows_after(number, answer))
        return Settled(tensors)

    def _plugged(self, federation: Federation, result: RoundResult) -> RoundResult:
        owner, number = self._settings.owner, result.state.round
        request = Plug(adapter=select("adapter", result.state.tensors))
        rows, failures = list[Row](), dict(result.failures)
        for reply in federation.ask(request, round_=number, to=[owner]):
            if isinstance(reply.payload, Plugged):
                rows += _rows(number, reply.payload)
            else:
                failures[owner] = getattr(reply.payload, "code", "PAYLOAD_REFUSED")
        return replace(result, rows=[*result.rows, *rows], failures=failures)

    def _handed(self, federation: Federation, result: RoundResult) -> RoundResult:
        settings = self._settings
        adapter, delivered = self._averaging.final(result.state)
        to = [settings.owner] if settings.deliver_to_owner != "nothing" else []
        to += trainers(settings, federation.parties) if settings.deliver_to_clients == "adapter" else ()
        failures = dict(result.failures)
        request = Hand(adapter=adapter, delivered=delivered)
        for reply in federation.ask(request, round_=result.state.round, to=to):
            if not isinstance(reply.payload, Handed):
                failures[reply.party] = getattr(reply.payload, "code", "PAYLOAD_REFUSED")
        return replace(result, failures=failures)


def _rows(number: int, answer: Plugged) -> list[Row]:
    """Return the owner's losses as rows: `emulator` and `plugged`, and the same on the common test set."""
    names = (EMULATOR, PLUGGED, f"{EMULATOR}_common", f"{PLUGGED}_common")
    return [
        row
        for split in names
        if split in answer.losses
        for row in rows_of(number, None, split, {"loss_nats": answer.losses[split]})
    ]


class Client(AveragingClient):
    """A party that tunes the package's outer layers: FedHomoLLM's half, and the end."""

    def handle(self, request: Payload, *, round_: int, deadline: float) -> Payload:
        """Return the answer to one request; see `ClientHalf`."""
        if isinstance(request, Hand):
            plain, correction = split(request.adapter)
            check_manifest(plain, self._c.model.manifest, sender="server")
            self._check_beside(correction)
            self._c.deliver(dict(request.adapter))
            return Handed()
        return super().handle(request, round_=round_, deadline=deadline)

    def _check_beside(self, folded: Tensors) -> None:
        """Return if what stands beside the adapter is a correction of the emulator's middle, or nothing."""
        check_correction(folded, self._c.model, self._c.settings.correction_rank)


class Owner:
    """The owner's half. It has no state: what it answers follows from the request."""

    def __init__(self, context: ClientContext) -> None:
        self._c = context

    def handle(self, request: Payload, *, round_: int, deadline: float) -> Payload:
        """Return the answer to one request; see `ClientHalf`."""
        match request:
            case Plug():
                return self._plug(request, round_)
            case Realign():
                return self._realign(request, round_, deadline)
            case Hand():
                self._c.deliver(self._checked(request.adapter))
                return Handed()
        raise PayloadError(
            "PAYLOAD_REFUSED", f"the owner does not answer {type(request).__name__}", where=self._c.party
        )

    def state(self) -> State:
        """Return nothing to remember."""
        return State(0, {})

    def restore(self, state: State) -> None:
        """Do nothing."""

    def _plug(self, request: Plug, number: int) -> Plugged:
        c, adapter = self._c, self._checked(request.adapter)
        if self._is_rehearsal():
            return Plugged(losses={})
        c.model.write(request.adapter)
        losses = self._losses(c.model.model, EMULATOR, number)
        # The whole model has a middle of its own, which needs no correction.
        with self._full().plugged(adapter, c.model.model) as whole:
            losses |= self._losses(whole.model, PLUGGED, number)
        return Plugged(losses=losses)

    def _realign(self, request: Realign, number: int, deadline: float) -> Realigned:
        self._checked(request.adapter)
        if self._is_rehearsal():
            manifest = self._c.model.beside(self._c.settings.correction_rank)
            # Another one each time: what did not change might not be sent again.
            losses = {"before": 1.2345678901234567, "after": 1.2345678901234567}
            return Realigned(correction=first_correction(manifest, self._c.seed + number), losses=losses)
        return realigned(self._c, request, full=self._full(), number=number, deadline=deadline)

    def _checked(self, received: TensorMap) -> Tensors:
        """Return the adapter without the correction beside it, both checked."""
        adapter, correction = split(received)
        check_manifest(adapter, self._c.model.manifest, sender="server")
        check_correction(correction, self._c.model, self._c.settings.correction_rank)
        return adapter

    def _is_rehearsal(self) -> bool:
        """Return whether only the messages' lengths are looked at: no owner is without data."""
        data = self._c.data
        return not any((data.train, data.held_out, data.common))

    def _losses(self, model: Any, split: str, number: int) -> dict[str, float]:
        """Return a model's losses on the probe set and on the common test set, and note them."""
        c, found = self._c, dict[str, float]()
        probe = [*c.data.train, *c.data.held_out]
        for name, examples in ((split, probe), (f"{split}_common", c.data.common)):
            sums = (
                evaluate_examples(model, examples, pad_id=c.pad_id, batch_size=c.eval_batch_size)
                if examples
                else LossSums()
            )
            if sums.tokens:
                c.log(number, name, sums.values())
                found[name] = sums.loss_nats
        return found

    def _full(self) -> FullModel:
        if self._c.full is None:
            what = "this site is the owner's, and its party file does not say where the whole model is"
            fix = "write the section `emulator` with `full_model_name_or_path` into party.yaml"
            raise ModelError("MODEL_NOT_FOUND", what, where=f"party {self._c.party}", fix=fix)
        return self._c.full


def client(context: ClientContext) -> ClientHalf:
    """Return a party's half: the owner's, or a client's.

    Args:
        context: The party's.
    """
    return Owner(context) if context.party == context.settings.owner else Client(context)


def alone(settings: ScenarioSettings) -> Settings:
    """Return the settings of a yardstick: one party that tunes the emulator by itself; nobody plugs in.

    Args:
        settings: The federation's.
    """
    plain = alone_in_averaging(settings).model_dump()
    own = {"plug_every": 0, "realign_every": 0, "realign_steps": None, "realign_rank": None}
    return Settings.model_validate(plain | own | {"deliver_to_clients": "adapter"})


def answer(settings: Settings, adapter: Manifest, number: int, party: str) -> Manifest:
    """Return what a party's answer to a round of training holds; the owner's holds nothing.

    Args:
        settings: The scenario's.
        adapter: The tensors that are tuned.
        number: The round.
        party: The party.
    """
    return {} if party == settings.owner else answer_in_averaging(settings, adapter, number, party)


def unused(settings: Settings) -> tuple[type[Payload], ...]:
    """Return the requests that a job does not make.

    Args:
        settings: The scenario's.
    """
    return () if settings.realign_every else (Realign,)


def beside(settings: Settings, model: TunableModel) -> Manifest:
    """Return the tensors that may travel beside the adapter: the correction of the emulator's middle.

    Args:
        settings: The scenario's.
        model: The package, with its adapter.
    """
    return model.beside(settings.correction_rank) if settings.correction_rank else {}


SCENARIO = Scenario(
    settings=Settings,
    requests=(SendInitial, Train, Evaluate, Realign, Plug, Hand),
    unused=unused,
    beside=beside,
    replies=(Initial, Summand, Realigned, Plugged, Handed),
    server=Server,
    client=client,
    alone=alone,
    clashes=clashes,
    answer=answer,
    who_learns_what=who_learns_what,
    private=private,
    trainers=trainers,
    delivered=delivered,
    sender=sender,
)
