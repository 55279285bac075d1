"""The seams of a conversation: what a server half and a client half may use, and what they hand back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field

from fedllm.data.settings import DataSettings
from fedllm.data.tokens import TokenisedExample
from fedllm.errors import PayloadError
from fedllm.models.adapter import TunableModel
from fedllm.models.emulator_settings import EmulatorSettings
from fedllm.models.full import FullModel
from fedllm.models.settings import PeftSettings
from fedllm.privacy.budget import Budget
from fedllm.privacy.settings import PrivacySettings
from fedllm.train.base import LocalTrainer
from fedllm.train.corrections import Correction
from fedllm.train.settings import TrainSettings
from fedllm.wire.frame import check_finite, check_manifest
from fedllm.wire.payload import Failure, Manifest, Payload, TensorMap, Tensors

Row = dict[str, Any]
# Key, what is wrong, and how to mend it.
Clash = tuple[str, str, str]
Log = Callable[[int, str | None, Mapping[str, float | int | None]], None]


class ScenarioSettings(BaseModel):
    """The job's `federation` section: the words that every scenario shares."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    num_rounds: int = Field(ge=1, description="Rounds of the run.")
    min_parties: int = Field(2, ge=1, description="A round with fewer answers pauses the run.")
    fraction_train: float = Field(1.0, gt=0, le=1, description="Share of the parties drawn for each round.")
    round_timeout: float = Field(3600.0, gt=0, description="Seconds that a party has for one request.")

    def cohort_size(self, num_parties: int) -> int:
        """Return how many parties train in a round.

        Args:
            num_parties: Of the job.
        """
        share = math.ceil(self.fraction_train * num_parties - 1e-9)
        return min(num_parties, max(share, self.min_parties))


@dataclass(frozen=True)
class State:
    """All that a half must remember from one round to the next: named tensors and plain fields."""

    round: int
    tensors: Tensors
    fields: dict[str, Any] = field(default_factory=dict)


class Summand(Payload):
    """A reply that only ever becomes part of a sum: `tensors` times `weight`, and `counts` as they are."""

    weight: int = Field(ge=1, le=2**40)
    counts: dict[str, float]
    tensors: TensorMap


@dataclass(frozen=True)
class Reply:
    """One party's answer, visible to the server."""

    party: str
    payload: Payload


@dataclass(frozen=True)
class Total:
    """The sum over the parties that answered, who they are, and who failed with which code."""

    parties: tuple[str, ...]
    means: Tensors
    weight: int
    counts: dict[str, float]
    failures: dict[str, str]


# What a party's answer holds: the same for all, or as the party says.
Manifests = Manifest | Callable[[str], Manifest]
# (party, tensors of its answer) -> what they are summed as.
Decode = Callable[[str, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def as_it_is(party: str, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return the tensors: nothing was encoded.

    Args:
        party: Whose answer it is.
        tensors: The answer's.
    """
    return tensors


def manifest_for(party: str, manifests: Manifests) -> Manifest:
    """Return what a party's answer holds.

    Args:
        party: The party.
        manifests: For all alike, or by party.
    """
    return manifests(party) if callable(manifests) else manifests


class Federation(Protocol):
    """What a server half talks to: two calls carry every protocol."""

    @property
    def parties(self) -> tuple[str, ...]:
        """The parties of the run, in the job's order."""
        ...

    def ask(self, request: Payload, *, round_: int, to: Sequence[str]) -> Iterator[Reply]:
        """Yield each party's answer as it arrives; a failure is a `Failure` payload."""
        ...

    def total(
        self, request: Payload, *, round_: int, to: Sequence[str], manifest: Manifests, decode: Decode = as_it_is
    ) -> Total:
        """Return the weighted sum of the answers (each a `Summand`) and who is in it, nothing else.

        `manifest` is what each answer holds as it travels; what is summed is what `decode` makes of it.
        """
        ...


def collect(
    federation: Federation,
    request: Payload,
    *,
    round_: int,
    to: Sequence[str],
    manifest: Manifests,
    decode: Decode = as_it_is,
) -> tuple[Total, list[tuple[str, Summand]]]:
    """Return what `total` does but for the means, and each party's answer, in the order of `to`.

    For rules that need each answer by itself. All of them are in memory at a time.

    Args:
        federation: The parties.
        request: What is asked.
        round_: The round.
        to: Who is asked.
        manifest: What each answer holds as it travels.
        decode: Makes what is handed back of it.
    """
    found: dict[str, Summand] = {}
    failures: dict[str, str] = {}
    for reply in federation.ask(request, round_=round_, to=to):
        try:
            found[reply.party] = _summand(reply, manifest_for(reply.party, manifest), decode)
        except PayloadError as error:
            failures[reply.party] = error.code
    answers = [(party, found[party]) for party in to if party in found]
    counts: dict[str, float] = {}
    for _, answer in answers:
        for name, value in answer.counts.items():
            counts[name] = counts.get(name, 0.0) + value
    weight = sum(answer.weight for _, answer in answers)
    return Total(tuple(party for party, _ in answers), {}, weight, counts, failures), answers


def _summand(reply: Reply, manifest: Manifest, decode: Decode) -> Summand:
    if isinstance(reply.payload, Failure):
        raise PayloadError(reply.payload.code, "the party failed", where=reply.party)
    if not isinstance(reply.payload, Summand):
        raise PayloadError("PAYLOAD_REFUSED", "the answer is not a summand", where=reply.party)
    check_manifest(reply.payload.tensors, manifest, sender=reply.party)
    tensors = dict(decode(reply.party, reply.payload.tensors))
    check_finite(tensors, sender=reply.party)
    return reply.payload.model_copy(update={"tensors": tensors})


@dataclass(frozen=True)
class RoundResult:
    """What a server half hands back after a round."""

    state: State
    rows: list[Row]
    failures: dict[str, str]


class ServerHalf(Protocol):
    """The server's side of a scenario. Between rounds it lives in a `State` and nowhere else."""

    def start(self, federation: Federation) -> RoundResult:
        """Return the state of round 0."""
        ...

    def round(self, federation: Federation, state: State) -> RoundResult:
        """Return the state after the next round."""
        ...

    def final(self, state: State) -> tuple[Tensors, int]:
        """Return the tensors to deliver, none where each party has a model of its own, and the round they are of."""
        ...


@dataclass(frozen=True)
class TokenData:
    """A party's examples as tokens; `common` is the job's common test set, the same everywhere.

    `digest` is of the raw rows that the party trains on and holds out of, from `fedllm.data.rows`; empty where they are
    not known.
    """

    train: Sequence[TokenisedExample]
    held_out: Sequence[TokenisedExample]
    common: Sequence[TokenisedExample]
    digest: str = ""


@dataclass(frozen=True)
class ClientContext:
    """What a client half may use; nothing of it leaves the party except through its replies.

    `parties` are all of the job; `settings` is the scenario's own; `log(round, split, values)` writes metrics that stay
    at the party, and `deliver(tensors)` what is the party's alone. `budget` pays for rounds with noise. `pull` is the
    party's own mark on the model: it goes among the corrections of each round of training. `full` is the whole model of
    an emulator, at its owner, `emulator` how the owner made it, and `public` the text that it is distilled on.
    """

    party: str
    parties: tuple[str, ...]
    seed: int
    settings: Any
    model: TunableModel
    pad_id: int
    data: TokenData
    data_settings: DataSettings
    train_settings: TrainSettings
    privacy: PrivacySettings
    eval_batch_size: int
    trainer: LocalTrainer
    log: Log
    on_step: Callable[[int, int], None] = lambda step, num_steps: None
    deliver: Callable[[Tensors], None] = lambda tensors: None
    budget: Budget | None = None
    pull: Correction | None = None
    full: FullModel | None = None
    emulator: EmulatorSettings | None = None
    public: Sequence[TokenisedExample] = ()


class ClientHalf(Protocol):
    """A party's side of a scenario."""

    def handle(self, request: Payload, *, round_: int, deadline: float) -> Payload:
        """Return the answer to one request.

        Args:
            request: One of the scenario's request payloads.
            round_: The round.
            deadline: `time.monotonic()` at which to give up with `ROUND_TIMEOUT`.
        """
        ...

    def state(self) -> State:
        """Return what must survive a crash; its round is the last one trained in."""
        ...

    def restore(self, state: State) -> None:
        """Take back what `state` returned."""
        ...


@dataclass(frozen=True)
class Scenario:
    """One line of the table of scenarios.

    `clashes(settings, train, peft, privacy, parties)` yields what cannot be asked together, as (key, what, fix).
    `who_learns_what(settings, privacy)` says it in sentences. `private(settings, request)` names what a request's
    answers add up to where none may be seen by itself, and is empty else; a party goes by its own job there.
    `answer(settings, manifest, round, party)` says what a party's answer to a round of training holds, for an adapter
    of these tensors. No round differs from the one two rounds before. `unused(settings)` names requests that a job with
    these settings does not make, and `grown(settings, manifest, round, parties)` says by how many bytes a request is
    longer than the adapter after so many rounds. `beside(settings, model)` are the tensors that may travel beside the
    adapter of a model. `trainers(settings, parties)` are those that train, and `delivered(settings)` says in a sentence
    who gets what, where that is not one adapter for all. `sender(settings, parties)` is the party that sends the base
    model to those who lack it.
    """

    settings: type[ScenarioSettings]
    requests: tuple[type[Payload], ...]
    replies: tuple[type[Payload], ...]
    server: Callable[..., ServerHalf]
    client: Callable[[ClientContext], ClientHalf]
    alone: Callable[[ScenarioSettings], ScenarioSettings]
    clashes: Callable[[Any, TrainSettings, PeftSettings, PrivacySettings, Sequence[str]], Iterable[Clash]]
    answer: Callable[[Any, Manifest, int, str], Manifest]
    who_learns_what: Callable[[Any, PrivacySettings], tuple[str, ...]]
    private: Callable[[Any, Payload], str]
    unused: Callable[[Any], tuple[type[Payload], ...]] = lambda settings: ()
    grown: Callable[[Any, Manifest, int, Sequence[str]], int] = lambda settings, manifest, round_, parties: 0
    beside: Callable[[Any, TunableModel], Manifest] = lambda settings, model: {}
    trainers: Callable[[Any, Sequence[str]], tuple[str, ...]] = lambda settings, parties: tuple(parties)
    delivered: Callable[[Any], str] = lambda settings: ""
    sender: Callable[[Any, Sequence[str]], str | None] = lambda settings, parties: None

    def operations(self, settings: ScenarioSettings) -> tuple[str, ...]:
        """Return the names of the requests that a job makes.

        Args:
            settings: The scenario's.
        """
        unused = self.unused(settings)
        return tuple(request.__name__ for request in self.requests if request not in unused)

    def kinds(self) -> dict[str, type[Payload]]:
        """Return the closed schema of the conversation: payload classes by name."""
        classes: list[type[Payload]] = [*self.requests, *self.replies, Failure]
        return {cls.__name__: cls for cls in classes}
