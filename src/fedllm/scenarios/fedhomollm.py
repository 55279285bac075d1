"""FedHomoLLM: all parties hold the same base model and tune one adapter together by federated averaging.

Source: Fan et al. 2023, arXiv:2310.10049, section 3.1 (FedHomoLLM); FedAvg of McMahan et al. 2017,
arXiv:1602.05629, algorithm 1, on PEFT parameters. Differs: the weighted sum is exact (integers on a grid),
so that its bits do not depend on the order of arrival; FedAvgM (Hsu et al. 2019) is offered beside FedAvg.

A round: Train -> sum of updates -> server optimiser -> Evaluate -> sum of losses. Each sum is a `total`, so the
server half needs no single party's update, but for FlexLoRA and the robust rules, which `ask`. The strategies
(`fedllm.aggregate.server`), the rules for LoRA's factors (`fedllm.aggregate.lora`), the robust rules
(`fedllm.aggregate.robust`) and the codecs (`fedllm.wire.codecs`) are settings of this conversation.

SCAFFOLD (Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1, option II) differs in two things: its means are
weighted as `weight_by` says, and a party whose answer was not counted goes back to the control variate before it, so
that c stays the mean of the c_i.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from fedllm.aggregate.lora import LoraRule, drift, moving, sites, sketch, travelling, truncated_product
from fedllm.aggregate.robust import COORDINATEWISE, RobustSettings, Update, robust_mean, weighted_sum
from fedllm.aggregate.server import StrategySettings, server_step
from fedllm.data.batches import BatchOrder
from fedllm.errors import PayloadError, RunFailed, RunPaused
from fedllm.evaluate.loss import LossSums, evaluate_examples
from fedllm.models.settings import PeftSettings
from fedllm.scenarios.base import (
    ClientContext,
    Decode,
    Federation,
    RoundResult,
    Row,
    Scenario,
    ScenarioSettings,
    State,
    Summand,
    Total,
    as_it_is,
    collect,
)
from fedllm.seeds import stream
from fedllm.train.base import TrainTask
from fedllm.train.corrections import Correction, control_variate, decoupled_proximal, next_control, proximal
from fedllm.train.optimizer import learning_rates, load_optimizer_tensors, make_optimizer, optimizer_tensors
from fedllm.train.settings import TrainSettings
from fedllm.wire.blob import in_memory, parts_of
from fedllm.wire.codecs import Codec, CodecSettings
from fedllm.wire.frame import check_manifest
from fedllm.wire.patch import DownSettings, Patched, next_sent
from fedllm.wire.payload import Manifest, Payload, TensorMap, Tensors, TensorSpec, manifest_of

Split = Literal["held_out", "common"]


class Settings(ScenarioSettings):
    """The job's `federation` section for FedHomoLLM."""

    strategy: StrategySettings = Field(StrategySettings(), description="The server's optimiser.")
    lora_rule: LoraRule = Field(
        "FedIT",
        description="LoRA: average both factors (FedIT), only B (FFA-LoRA), B and A in turns (RoLoRA), or the products "
        "(FlexLoRA).",
    )
    robust: RobustSettings = Field(RobustSettings(), description="What bears dishonest parties.")
    codec: CodecSettings = Field(CodecSettings(), description="How updates are encoded on their way up.")
    codec_down: DownSettings = Field(
        DownSettings(), description="How the global adapter's change is encoded on its way down."
    )
    drift_meter: bool = Field(
        True, description="Measure how far the mean of LoRA's factors is from the mean of their products (FedIT)."
    )
    weight_by: Literal["examples", "tokens", "equal"] = Field(
        "examples", description="A party's weight in the mean: its training examples, its target tokens, or 1."
    )
    eval_every: int = Field(1, ge=0, description="Evaluate the global adapter every so many rounds; 0 = never.")
    keep: Literal["best", "last"] = Field(
        "best", description="Deliver the round of lowest held-out loss (where held-out data exist), or the last."
    )


class SendInitial(Payload):
    """Server -> one party: make the first adapter from the job's seed."""


class Initial(Payload):
    """Party -> server: the first adapter. It depends on the seed and the base model alone."""

    adapter: TensorMap


class Train(Payload):
    """Server -> parties: start from this adapter and train for one round."""

    commits: ClassVar[bool] = True
    adapter: TensorMap
    # SCAFFOLD: the server's control variate. Also with error feedback: when each party's answer was last counted.
    control: TensorMap = Field(default_factory=dict)
    counted: dict[str, int] = Field(default_factory=dict)


class Evaluate(Payload):
    """Server -> parties: the loss of this adapter on one split."""

    adapter: TensorMap
    split: Split


class Server:
    """The server's half. It needs neither the base model nor any data."""

    def __init__(self, settings: Settings, *, seed: int, common: bool) -> None:
        self._settings, self._seed, self._common = settings, seed, common

    def start(self, federation: Federation) -> RoundResult:
        """Return the state of round 0: the initial adapter, evaluated."""
        party = federation.parties[0]
        for reply in federation.ask(SendInitial(), round_=0, to=[party]):
            if isinstance(reply.payload, Initial):
                state = State(0, _prefixed("adapter", reply.payload.adapter), {"best": None, "best_loss": None})
                return self._evaluated(federation, state, rows=[], failures={})
            raise RunFailed(
                getattr(reply.payload, "code", "PARTY_FAILED"), "no initial adapter was made", where=f"party {party}"
            )
        raise RunPaused("QUORUM", "no answer to the request for the initial adapter", where=f"party {party}")

    def round(self, federation: Federation, state: State) -> RoundResult:
        """Return the state after one round of local training."""
        number, settings = state.round + 1, self._settings
        adapter, control = _select("adapter", state.tensors), self._control(state)
        cohort = self._cohort(federation.parties, number)
        counted = state.fields.get("counted", {})
        request = Train(adapter=_sent(settings, state), control=control, counted=counted)
        manifest = manifest_of(adapter)
        # What travels, and what becomes of it here.
        expected, decode = answer(settings, manifest, number), _decoder(settings, manifest, number, self._seed)
        if _needs_each(settings):
            total, answers = collect(federation, request, round_=number, to=cohort, manifest=expected, decode=decode)
            self._check_quorum(total, number)
            total = replace(total, means=_combined(settings, adapter, answers))
        else:
            total = federation.total(request, round_=number, to=cohort, manifest=expected, decode=decode)
            self._check_quorum(total, number)
        update, control_update = _select("update", total.means), _select("control", total.means)
        share = len(total.parties) / len(federation.parties)
        control = control | {name: control[name] + share * change for name, change in control_update.items()}
        rows = _train_rows(number, replace(total, means=update))
        if saved := _saved_bytes(settings, manifest, number):
            rows += [row for party in total.parties for row in rows_of(number, party, None, {"bytes_saved": saved})]
        if met := _select("drift", total.means):
            value = drift(met, adapter, update, seed=self._seed, number=number)
            rows += rows_of(number, None, None, {"lora_drift": value})
        moved, memory = server_step(adapter, _select("server", state.tensors), update, settings=settings.strategy)
        tensors = _prefixed("adapter", moved) | _prefixed("server", memory) | _prefixed("control", control)
        tensors, note = _as_sent(settings, state, tensors, number)
        keeps = settings.strategy.name == "SCAFFOLD" or settings.codec.error_feedback
        fields = state.fields | note | ({"counted": counted | dict.fromkeys(total.parties, number)} if keeps else {})
        new = State(number, tensors | _best_so_far(state), fields)
        return self._evaluated(federation, new, rows=rows, failures=total.failures)

    def _control(self, state: State) -> Tensors:
        if self._settings.strategy.name != "SCAFFOLD":
            return {}
        adapter = _select("adapter", state.tensors)
        return _select("control", state.tensors) or {name: torch.zeros_like(t) for name, t in adapter.items()}

    def final(self, state: State) -> tuple[Tensors, int]:
        """Return the adapter to deliver and its round."""
        best = state.fields["best"]
        if self._settings.keep == "best" and best is not None and best != state.round:
            return _select("best", state.tensors), int(best)
        return _select("adapter", state.tensors), state.round

    def _cohort(self, parties: tuple[str, ...], number: int) -> list[str]:
        share = math.ceil(self._settings.fraction_train * len(parties) - 1e-9)
        size = min(len(parties), max(share, self._settings.min_parties))
        chosen = set(stream(self._seed, "cohort", number).permutation(len(parties))[:size].tolist())
        return [party for index, party in enumerate(parties) if index in chosen]

    def _check_quorum(self, total: Total, number: int) -> None:
        least, root = self._settings.min_parties, self._settings.robust.root_party
        if len(total.parties) < least:
            what = f"{len(total.parties)} parties finished, federation.min_parties is {least}"
        elif root is not None and root not in total.parties:
            what = f"{root}, whose update is trusted, did not finish"
        else:
            return
        failed = ", ".join(f"{party}: {code}" for party, code in sorted(total.failures.items()))
        # Waiting can cure a slow party, and space a full disk; a party whose training diverged will diverge again.
        may_pass = set(total.failures.values()) <= {"ROUND_TIMEOUT", "DISK_FULL"}
        error = RunPaused if may_pass else RunFailed
        fix = "see the party's own log for the reason; then `fedllm resume RUN`"
        raise error("QUORUM", f"{what} ({failed})", where=f"round {number}", fix=fix)

    def _evaluated(
        self, federation: Federation, state: State, *, rows: list[Row], failures: Mapping[str, str]
    ) -> RoundResult:
        every = self._settings.eval_every
        due = every and (state.round % every == 0 or state.round == self._settings.num_rounds)
        if not due:
            return RoundResult(state, rows, dict(failures))
        adapter = _sent(self._settings, state)
        parties = federation.parties
        totals: dict[Split, Total] = {"held_out": _evaluate(federation, adapter, "held_out", state.round, parties)}
        if self._common:
            # The common set is the same everywhere, so one party's word is enough; they take turns.
            one = (parties[state.round % len(parties)],)
            totals["common"] = _evaluate(federation, adapter, "common", state.round, one)
        rows = rows + [row for split, total in totals.items() for row in _loss_rows(state.round, split, total)]
        failures = dict(failures) | {p: code for total in totals.values() for p, code in total.failures.items()}
        return RoundResult(_with_best(state, totals["held_out"]), rows, failures)


def _needs_each(settings: Settings) -> bool:
    """Return whether the server must see each party's update; a sum of them is enough otherwise."""
    return settings.robust.name != "none" or settings.lora_rule == "FlexLoRA"


def _combined(settings: Settings, adapter: Tensors, answers: list[tuple[str, Summand]]) -> Tensors:
    updates = [Update(party, answer.weight, _select("update", answer.tensors)) for party, answer in answers]
    if settings.robust.name != "none":
        return _prefixed("update", robust_mean(adapter, updates, settings.robust))
    shares = [update.weight / sum(other.weight for other in updates) for update in updates]
    means = weighted_sum(updates, shares)
    return _prefixed("update", means | truncated_product(adapter, [update.tensors for update in updates], shares))


def clashes(
    settings: Settings, train: TrainSettings, peft: PeftSettings, parties: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    """Yield what cannot be asked together, as (key, what, fix).

    Args:
        settings: The scenario's.
        train: The job's `train` section.
        peft: Its `peft` section.
        parties: Its parties.
    """
    strategy, robust = settings.strategy, settings.robust
    if strategy.name == "SCAFFOLD" and train.optim != "sgd":
        what = f"SCAFFOLD's control variates are mean gradients under plain SGD only, not under {train.optim} (E17)"
        yield "train.optim", what, "set `optim: sgd` (with a higher learning_rate), or another `federation.strategy`"
    if strategy.name == "SCAFFOLD" and _needs_each(settings):
        what = "SCAFFOLD's control variates are means, which the rule that looks at each update does not make"
        yield "federation.strategy", what, "set another `strategy`, or leave `robust` and FlexLoRA out"
    if strategy.name == "SCAFFOLD" and settings.codec.name != "fp32":
        what = f"control variates must arrive whole, not as {settings.codec.name}, or their mean is not the server's"
        yield "federation.codec", what, "set `codec: {name: fp32}`, or another `strategy`"
    yield from _clashes_of_codec_down(settings)
    if settings.lora_rule == "FlexLoRA":
        yield from _clashes_of_flexlora(settings, train, peft)
    yield from _clashes_of_robust(settings, parties)
    if robust.name in COORDINATEWISE and settings.lora_rule == "FedIT":
        what = f"{robust.name} compares coordinates, and LoRA's product has none in common while both factors move"
        yield "federation.robust", what, "set `lora_rule: RoLoRA` or FFA-LoRA, or a rule such as MultiKrum"


def _clashes_of_flexlora(
    settings: Settings, train: TrainSettings, peft: PeftSettings
) -> Iterator[tuple[str, str, str]]:
    key, new = "federation.lora_rule", "FlexLoRA takes new axes for the factors in every round"
    plain = settings.strategy.name in ("FedAvg", "FedProx") and settings.strategy.server_learning_rate == 1
    if not plain:
        what = f"{new}, so a server's momentum or step size has no meaning"
        yield key, what, "set `strategy: {name: FedAvg}`, or another `lora_rule`"
    if train.optim != "sgd" and train.optimizer_state == "keep":
        what = f"{new}, so what {train.optim} remembers of the last one does not fit"
        yield key, what, "set `train.optimizer_state: reset`"
    if settings.robust.name != "none":
        what = f"FlexLoRA and {settings.robust.name} would both take the mean's place"
        yield key, what, "set another `lora_rule`, or leave `robust` out"
    if settings.codec.error_feedback:
        what = f"{new}, so what a codec lost of the last update does not fit"
        yield key, what, "set `codec.error_feedback: false`"
    if peft.use_dora:
        yield key, "with DoRA the model is not linear in the product that FlexLoRA keeps", "set `use_dora: false`"


def _clashes_of_codec_down(settings: Settings) -> Iterator[tuple[str, str, str]]:
    key, name = "federation.codec_down", settings.codec_down.name
    if name == "fp32":
        return
    if settings.lora_rule not in ("FedIT", "FFA-LoRA", "RoLoRA"):
        what = (
            f"{settings.lora_rule} takes new factors in every round, to which what {name} lost of a change is no part"
        )
        yield key, what, "set `codec_down: {name: fp32}`, or another `lora_rule`"
    if settings.strategy.name == "SCAFFOLD":
        what = "SCAFFOLD's control variate goes down beside the adapter, and must arrive whole"
        yield key, what, "set `codec_down: {name: fp32}`, or another `strategy`"


def _clashes_of_robust(settings: Settings, parties: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    robust, least = settings.robust, settings.robust.least_parties()
    if settings.min_parties < least:
        bears = f" to bear {robust.num_malicious} of them" if robust.num_malicious else ""
        what = f"{robust.name} needs {least} answers{bears}, and min_parties is {settings.min_parties} (E21)"
        yield "federation.min_parties", what, f"set `min_parties` to {least} or more, or lower num_malicious"
    if robust.root_party is not None and robust.root_party not in parties:
        yield "federation.robust", f"the root party {robust.root_party!r} is no party of the job", "name one of them"
    if robust.root_party is not None and settings.fraction_train < 1:
        what = "FLTrust needs its root party in every round, and fraction_train draws some of the parties"
        yield "federation.fraction_train", what, "set `fraction_train: 1.0`"


def _travelling(settings: Settings, state: State) -> Tensors:
    adapter = _select("adapter", state.tensors)
    return {name: adapter[name] for name in travelling(settings.lora_rule, adapter)}


def _sent(settings: Settings, state: State) -> Mapping[str, torch.Tensor]:
    """Return the global adapter as it is sent: where it can be, with the change that leads to it."""
    whole, change = _travelling(settings, state), _select("change", state.tensors)
    return Patched(whole, change, state.fields["change_of"]) if change else whole


def _as_sent(settings: Settings, state: State, tensors: Tensors, number: int) -> tuple[Tensors, dict[str, Any]]:
    """Return a round's new tensors with the adapter that the parties will hold, and what the change to it is of."""
    codec = settings.codec_down.codec
    if codec.is_plain:
        return tensors, {}
    before, lost = _select("adapter", state.tensors), _select("lost", state.tensors)
    names = moving(settings.lora_rule, before, number)
    sent = next_sent(before, _select("adapter", tensors), lost, names=names, codec=codec)
    found = _prefixed("adapter", sent.tensors) | _prefixed("change", sent.change) | _prefixed("lost", sent.lost)
    held = in_memory(parts_of(_prefixed("adapter", _travelling(settings, state))))
    return tensors | found, {"change_of": held.digest}


def _meets_drift(settings: Settings) -> bool:
    return settings.drift_meter and settings.lora_rule == "FedIT" and not _needs_each(settings)


def _coded(settings: Settings, adapter: Manifest, number: int) -> Manifest:
    """Return what of a party's answer is encoded."""
    moved = moving(settings.lora_rule, adapter, number)
    fields = ("update", "control") if settings.strategy.name == "SCAFFOLD" else ("update",)
    return {f"{field}/{name}": adapter[name] for field in fields for name in moved}


def _drift_vectors(settings: Settings, adapter: Manifest) -> Manifest:
    if not _meets_drift(settings):
        return {}
    rows = {site: adapter[left].shape[0] for site, (left, _) in sites(adapter).items()}
    return {f"drift/{site}": TensorSpec(dtype="float32", shape=[count]) for site, count in rows.items()}


def answer(settings: Settings, adapter: Manifest, number: int) -> Manifest:
    """Return what a party's answer to `Train` holds, as it travels.

    Args:
        settings: The scenario's.
        adapter: The tensors that are tuned.
        number: The round.
    """
    coded = Codec(settings.codec).manifest(_coded(settings, adapter, number))
    return coded | _drift_vectors(settings, adapter)


def _saved_bytes(settings: Settings, adapter: Manifest, number: int) -> int:
    """Return how many bytes fewer an answer takes than without a codec."""
    raw = _coded(settings, adapter, number)
    coded = Codec(settings.codec).manifest(raw)
    return sum(spec.num_bytes for spec in raw.values()) - sum(spec.num_bytes for spec in coded.values())


def _decoder(settings: Settings, adapter: Manifest, number: int, seed: int) -> Decode:
    codec, whole = Codec(settings.codec), _coded(settings, adapter, number) | _drift_vectors(settings, adapter)
    return as_it_is if codec.is_plain else partial(codec.decode, manifest=whole, seed=seed, number=number)


def _evaluate(federation: Federation, adapter: TensorMap, split: Split, number: int, to: tuple[str, ...]) -> Total:
    return federation.total(Evaluate(adapter=adapter, split=split), round_=number, to=to, manifest={})


def _with_best(state: State, held_out: Total) -> State:
    sums = _loss_sums(held_out)
    best_loss = state.fields["best_loss"]
    if not sums.tokens or (best_loss is not None and sums.loss_nats >= best_loss):
        return state
    # While the newest adapter is the best one it is not kept twice; `_best_so_far` copies it when it moves on.
    tensors = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("best/")}
    return State(state.round, tensors, state.fields | {"best": state.round, "best_loss": sums.loss_nats})


def _loss_sums(total: Total) -> LossSums:
    counts = total.counts
    return LossSums(
        counts.get("nll_nats", 0.0),
        round(counts.get("tokens", 0)),
        round(counts.get("bytes", 0)),
        round(counts.get("examples", 0)),
    )


def _loss_rows(number: int, split: str, total: Total) -> list[Row]:
    return rows_of(number, None, split, _loss_sums(total).values()) if _loss_sums(total).tokens else []


def _train_rows(number: int, total: Total) -> list[Row]:
    # What a party forgets to count must not stop the server: its rows are null then.
    values = {name: total.counts.get(name) for name in ("tokens", "examples", "steps")}
    loss, tokens = total.counts.get("loss_nats"), values["tokens"]
    values["loss_nats"] = loss / tokens if loss is not None and tokens else None
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in total.means.values()))
    return rows_of(number, None, "train", values) + rows_of(number, None, None, {"update_norm": norm})


def rows_of(number: int, party: str | None, split: str | None, values: Mapping[str, float | None]) -> list[Row]:
    """Return metric rows, one per value.

    Args:
        number: The round.
        party: Whose they are; None for the federation's.
        split: `train`, `held_out`, `common` or None.
        values: Metrics by name.
    """
    head: dict[str, Any] = {"round": number, "party": party, "split": split}
    return [head | {"name": name, "value": value} for name, value in values.items()]


class Client:
    """A party's half."""

    def __init__(self, context: ClientContext) -> None:
        self._c = context
        settings = context.train_settings
        self._optimizer = make_optimizer(context.model.trainable, settings)
        self._order = BatchOrder(
            len(context.data.train), settings.per_device_train_batch_size, seed=context.seed, party=context.party
        )
        self._round = 0
        self._rule: LoraRule = context.settings.lora_rule
        sent = set(travelling(self._rule, context.model.manifest))
        self._sent = {name: spec for name, spec in context.model.manifest.items() if name in sent}
        # What no message brings, since it never moves.
        first = context.model.initial(context.seed) if len(sent) < len(context.model.manifest) else {}
        self._fixed = {name: tensor for name, tensor in first.items() if name not in sent}
        # SCAFFOLD's control variate and what a codec lost, and both as they were before the last round trained in.
        self._control: Tensors = {}
        self._control_before: Tensors = {}
        self._lost: Tensors = {}
        self._lost_before: Tensors = {}
        self._steps = settings.local_steps or math.ceil(
            (settings.local_epochs or 0) * self._order.steps_per_epoch / settings.gradient_accumulation_steps
        )
        self._learning_rate = learning_rates(settings, total_steps=self._steps * context.settings.num_rounds)

    def handle(self, request: Payload, *, round_: int, deadline: float) -> Payload:
        """Return the answer to one request; see `ClientHalf`."""
        match request:
            case SendInitial():
                return Initial(adapter=self._c.model.initial(self._c.seed))
            case Train():
                return self._train(request, round_, deadline)
            case Evaluate():
                return self._evaluate(request, round_)
        raise PayloadError("PAYLOAD_REFUSED", f"{type(request).__name__} is no request", where=self._c.party)

    def state(self) -> State:
        """Return the optimiser's state, if it lives on from round to round, control variates, and what codecs lost."""
        keep = self._c.train_settings.optimizer_state == "keep"
        tensors = _prefixed("optimizer", optimizer_tensors(self._optimizer)) if keep else {}
        tensors |= _prefixed("control", self._control) | _prefixed("control_before", self._control_before)
        tensors |= _prefixed("lost", self._lost) | _prefixed("lost_before", self._lost_before)
        return State(self._round, tensors)

    def restore(self, state: State) -> None:
        """Take back what `state` returned."""
        load_optimizer_tensors(self._optimizer, _select("optimizer", state.tensors))
        self._control = _select("control", state.tensors)
        self._control_before = _select("control_before", state.tensors)
        self._lost, self._lost_before = _select("lost", state.tensors), _select("lost_before", state.tensors)
        self._round = state.round

    def _train(self, request: Train, number: int, deadline: float) -> Summand:
        c, settings = self._c, self._c.train_settings
        start = self._written(request.adapter)
        self._settle(request)
        if settings.optimizer_state == "reset":
            self._optimizer = make_optimizer(c.model.trainable, settings)
        moved = moving(self._rule, c.model.manifest, number)
        corrections = self._corrections(request, start)
        with c.model.only(moved):
            sums = c.trainer.train(self._task(number, deadline, corrections), self._optimizer)
        self._round = number
        end = c.model.read()
        update = {name: end[name] - start[name] for name in moved}
        counts = {name: float(getattr(sums, name)) for name in ("loss_nats", "tokens", "examples", "steps")}
        last_rate = self._learning_rate(number * self._steps - 1)
        mean = {"loss_nats": sums.loss_nats / max(sums.tokens, 1), "learning_rate": last_rate}
        c.log(number, "train", counts | mean)
        tensors = _prefixed("update", update) | _prefixed("control", self._control_update(request, update, number))
        tensors = self._encoded(tensors, number)
        if _meets_drift(c.settings):
            tensors |= _prefixed("drift", sketch(end, seed=c.seed, number=number))
        return Summand(weight=self._weight(), counts=counts, tensors=tensors)

    def _settle(self, request: Train) -> None:
        """Go back to what was kept before the last round trained in, if the answer to that was not counted."""
        if request.counted.get(self._c.party, 0) != self._round:
            self._control, self._lost = self._control_before, self._lost_before

    def _encoded(self, tensors: Tensors, number: int) -> Tensors:
        """Return what travels. With error feedback, what was lost before is added, and what is lost now is kept."""
        c, codec = self._c, Codec(self._c.settings.codec)
        whole = {name: tensor + self._lost[name] if name in self._lost else tensor for name, tensor in tensors.items()}
        coded = codec.encode(whole, seed=c.seed, party=c.party, number=number)
        if codec.settings.error_feedback:
            arrived = codec.decode(coded, manifest_of(whole), seed=c.seed, number=number)
            self._lost_before = self._lost
            self._lost = self._lost | {name: tensor - arrived[name] for name, tensor in whole.items()}
        return coded

    def _written(self, adapter: TensorMap) -> TensorMap:
        """Return the global state, all of it, after the model has taken it over."""
        check_manifest(adapter, self._sent, sender="server")
        whole = {**self._fixed, **adapter} if self._fixed else adapter
        self._c.model.write(whole)
        return whole

    def _corrections(self, request: Train, start: TensorMap) -> list[Correction]:
        c, strategy = self._c, self._c.settings.strategy
        if strategy.name == "SCAFFOLD":
            check_manifest(request.control, c.model.manifest, sender="server")
            zeros = {name: spec.zeros() for name, spec in c.model.manifest.items()}
            self._control = self._control or zeros
            return [control_variate(c.model.trainable, self._control, request.control)]
        if not strategy.proximal_mu:
            return []
        pull = decoupled_proximal if strategy.proximal == "decoupled" else proximal
        return [pull(c.model.trainable, start, strategy.proximal_mu)]

    def _control_update(self, request: Train, update: Tensors, number: int) -> Tensors:
        if not request.control:
            return {}
        rates = sum(self._learning_rate(step) for step in range((number - 1) * self._steps, number * self._steps))
        new = next_control(self._control, request.control, update, rates=rates)
        before, self._control_before = self._control, self._control
        self._control = before | new
        return {name: tensor - before[name] for name, tensor in new.items()}

    def _task(self, number: int, deadline: float, corrections: list[Correction]) -> TrainTask:
        c = self._c
        return TrainTask(
            party=c.party,
            round=number,
            seed=c.seed,
            model=c.model,
            examples=c.data.train,
            order=self._order,
            pad_id=c.pad_id,
            settings=c.train_settings,
            data_settings=c.data_settings,
            first_step=(number - 1) * self._steps,
            num_steps=self._steps,
            learning_rate=self._learning_rate,
            deadline=deadline,
            on_step=c.on_step,
            corrections=corrections,
        )

    def _weight(self) -> int:
        weight_by = self._c.settings.weight_by
        if weight_by == "tokens":
            return sum(sum(example.loss_mask[1:]) for example in self._c.data.train)
        return len(self._c.data.train) if weight_by == "examples" else 1

    def _evaluate(self, request: Evaluate, number: int) -> Summand:
        c = self._c
        self._written(request.adapter)
        examples = c.data.held_out if request.split == "held_out" else c.data.common
        sums = evaluate_examples(c.model.model, examples, pad_id=c.pad_id, batch_size=c.eval_batch_size)
        if sums.tokens:
            c.log(number, request.split, sums.values())
        counts = {"nll_nats": sums.nll_nats, "tokens": sums.tokens, "bytes": sums.bytes, "examples": sums.examples}
        return Summand(weight=1, counts={name: float(value) for name, value in counts.items()}, tensors={})


def _prefixed(prefix: str, tensors: Mapping[str, Any]) -> Tensors:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _select(prefix: str, tensors: Mapping[str, Any]) -> Tensors:
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def _best_so_far(state: State) -> Tensors:
    source = "adapter" if state.fields["best"] == state.round else "best"
    return _prefixed("best", _select(source, state.tensors))


def alone(settings: ScenarioSettings) -> Settings:
    """Return the settings of a yardstick: one party that trains for as many rounds, without server momentum.

    Args:
        settings: The federation's.
    """
    plain: dict[str, Any] = {
        "strategy": StrategySettings(),
        "robust": RobustSettings(),
        "codec": CodecSettings(),
        "lora_rule": "FedIT",
    }
    plain |= {"codec_down": DownSettings()}
    changes = {"min_parties": 1, "fraction_train": 1.0} | plain
    return Settings.model_validate(settings.model_dump() | changes)


SCENARIO = Scenario(
    settings=Settings,
    requests=(SendInitial, Train, Evaluate),
    replies=(Initial, Summand),
    server=Server,
    client=Client,
    alone=alone,
    clashes=clashes,
    answer=answer,
    who_learns_what=(
        "The server sees each party's update (no secure aggregation yet), with SCAFFOLD also its control variate and "
        "with the drift meter a random projection of its adapter, the sums of losses and counts, and the global "
        "adapter.",
        "Each party sees the global adapter after every round; never another party's update or data.",
        "Rows, prompts and completions never leave a party. Updates can leak something of them: see the threat model.",
    ),
)
