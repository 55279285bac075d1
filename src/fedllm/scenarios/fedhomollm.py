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
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from fedllm.aggregate.each import combined
from fedllm.aggregate.lora import drift, moving, sketch, travelling
from fedllm.aggregate.robust import RobustSettings, Update, robust_mean
from fedllm.aggregate.rules import LoraRule
from fedllm.aggregate.server import StrategySettings, server_step
from fedllm.aggregate.slots import own_slots, slot_means, without_others
from fedllm.data.batches import BatchOrder
from fedllm.errors import PayloadError, RunFailed, RunPaused
from fedllm.evaluate.loss import evaluate_examples
from fedllm.scenarios.base import (
    ClientContext,
    Federation,
    RoundResult,
    Row,
    Scenario,
    ScenarioSettings,
    State,
    Summand,
    Total,
    collect,
)
from fedllm.scenarios.fedhomollm_answer import Answer, answer
from fedllm.scenarios.fedhomollm_rows import loss_rows, loss_sums, rows_of, train_rows
from fedllm.scenarios.fedhomollm_settings import Settings, clashes, meets_drift, needs_each
from fedllm.seeds import stream
from fedllm.train.base import TrainTask
from fedllm.train.corrections import Correction, control_variate, decoupled_proximal, next_control, proximal
from fedllm.train.optimizer import learning_rates, load_optimizer_tensors, make_optimizer, optimizer_tensors
from fedllm.wire.codecs import Codec, CodecSettings
from fedllm.wire.frame import check_manifest
from fedllm.wire.payload import Manifest, Payload, TensorMap, Tensors, manifest_of

Split = Literal["held_out", "common"]


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
        counted = state.fields.get("counted", {})
        request = Train(adapter=_sent(settings, adapter), control=control, counted=counted)
        total = self._gathered(federation, request, number, adapter)
        update, control_update = _select("update", total.means), _select("control", total.means)
        share = len(total.parties) / len(federation.parties)
        control = control | {name: control[name] + share * change for name, change in control_update.items()}
        rows = train_rows(number, replace(total, means=update)) + self._saved_rows(number, total, adapter)
        if met := _select("drift", total.means):
            value = drift(met, adapter, update, seed=self._seed, number=number)
            rows += rows_of(number, None, None, {"lora_drift": value})
        moved, memory = server_step(adapter, _select("server", state.tensors), update, settings=settings.strategy)
        tensors = _prefixed("adapter", moved) | _prefixed("server", memory) | _prefixed("control", control)
        keeps = settings.strategy.name == "SCAFFOLD" or settings.codec.error_feedback
        fields = state.fields | ({"counted": counted | dict.fromkeys(total.parties, number)} if keeps else {})
        new = State(number, tensors | _best_so_far(state), fields)
        return self._evaluated(federation, new, rows=rows, failures=total.failures)

    def _gathered(self, federation: Federation, request: Train, number: int, adapter: Tensors) -> Total:
        """Return the mean update of a round, or what the settings put in its place."""
        settings, whole = self._settings, manifest_of(adapter)

        def manifest(party: str) -> Manifest:
            return answer(settings, whole, number, party)

        def decode(party: str, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            return Answer(settings, whole, number, party).decoded(tensors, seed=self._seed)

        to = self._cohort(federation.parties, number)
        if not needs_each(settings):
            total = federation.total(request, round_=number, to=to, manifest=manifest, decode=decode)
            self._check_quorum(total, number)
            return replace(total, means=slot_means(total.means))
        total, answers = collect(federation, request, round_=number, to=to, manifest=manifest, decode=decode)
        self._check_quorum(total, number)
        updates = [Update(party, found.weight, _select("update", found.tensors)) for party, found in answers]
        if settings.robust.name != "none":
            return replace(total, means=_prefixed("update", robust_mean(adapter, updates, settings.robust)))
        return replace(total, means=_prefixed("update", combined(settings.lora_rule, adapter, updates)))

    def _saved_rows(self, number: int, total: Total, adapter: Tensors) -> list[Row]:
        whole = manifest_of(adapter)
        saved = {party: Answer(self._settings, whole, number, party).saved_bytes() for party in total.parties}
        return [
            row
            for party, count in saved.items()
            if count
            for row in rows_of(number, party, None, {"bytes_saved": count})
        ]

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
        adapter = _sent(self._settings, _select("adapter", state.tensors))
        parties = federation.parties
        totals: dict[Split, Total] = {"held_out": _evaluate(federation, adapter, "held_out", state.round, parties)}
        if self._common:
            # The common set is the same everywhere, so one party's word is enough; they take turns.
            one = (parties[state.round % len(parties)],)
            totals["common"] = _evaluate(federation, adapter, "common", state.round, one)
        rows = rows + [row for split, total in totals.items() for row in loss_rows(state.round, split, total)]
        failures = dict(failures) | {p: code for total in totals.values() for p, code in total.failures.items()}
        return RoundResult(_with_best(state, totals["held_out"]), rows, failures)


def _sent(settings: Settings, adapter: Tensors) -> Tensors:
    return {name: adapter[name] for name in travelling(settings.lora_rule, adapter)}


def _evaluate(federation: Federation, adapter: Tensors, split: Split, number: int, to: tuple[str, ...]) -> Total:
    return federation.total(Evaluate(adapter=adapter, split=split), round_=number, to=to, manifest={})


def _with_best(state: State, held_out: Total) -> State:
    sums = loss_sums(held_out)
    best_loss = state.fields["best_loss"]
    if not sums.tokens or (best_loss is not None and sums.loss_nats >= best_loss):
        return state
    # While the newest adapter is the best one it is not kept twice; `_best_so_far` copies it when it moves on.
    tensors = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("best/")}
    return State(state.round, tensors, state.fields | {"best": state.round, "best_loss": sums.loss_nats})


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
        self._rank: int | None = context.settings.ranks.get(context.party)
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
        self._settle(request)
        start = self._started(request.adapter)
        if settings.optimizer_state == "reset":
            self._optimizer = make_optimizer(c.model.trainable, settings)
        moved = moving(self._rule, c.model.manifest, number)
        corrections = self._corrections(request, start)
        with c.model.only(moved):
            sums = c.trainer.train(self._task(number, deadline, corrections), self._optimizer)
        self._round = number
        end = c.model.read()
        update = {name: end[name] - start[name] for name in moved}
        if self._rank is not None:
            update = own_slots(update, self._rank)
        counts = {name: float(getattr(sums, name)) for name in ("loss_nats", "tokens", "examples", "steps")}
        last_rate = self._learning_rate(number * self._steps - 1)
        mean = {"loss_nats": sums.loss_nats / max(sums.tokens, 1), "learning_rate": last_rate}
        c.log(number, "train", counts | mean)
        tensors = _prefixed("update", update) | _prefixed("control", self._control_update(request, update, number))
        tensors = self._encoded(tensors, number)
        if meets_drift(c.settings):
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

    def _whole(self, adapter: TensorMap) -> TensorMap:
        """Return the global state, all of it."""
        check_manifest(adapter, self._sent, sender="server")
        return {**self._fixed, **adapter} if self._fixed else adapter

    def _started(self, adapter: TensorMap) -> TensorMap:
        """Return what local training starts from, after the model has taken it over: of LoRA the party's own slots."""
        whole = self._whole(adapter)
        start = whole if self._rank is None else without_others(whole, self._rank)
        self._c.model.write(start)
        return start

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
        self._c.model.write(self._whole(request.adapter))
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
    plain = {"strategy": StrategySettings(), "robust": RobustSettings(), "codec": CodecSettings(), "lora_rule": "FedIT"}
    changes = {"min_parties": 1, "fraction_train": 1.0, "ranks": {}} | plain
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
