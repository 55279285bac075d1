"""FedHomoLLM at a party: the half that trains and evaluates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from fedllm.aggregate.folded import check_folded, split
from fedllm.aggregate.lora import answered, moving, sketch, travelling
from fedllm.aggregate.rules import LoraRule
from fedllm.aggregate.slots import own_slots, without_others
from fedllm.data.batches import BatchOrder
from fedllm.errors import PayloadError
from fedllm.evaluate.loss import LossSums, evaluate_examples
from fedllm.models.fresh import fresh_factors
from fedllm.scenarios.base import ClientContext, State, Summand
from fedllm.scenarios.fedhomollm_kept import Kept
from fedllm.scenarios.fedhomollm_messages import (
    Deliver,
    Delivered,
    Evaluate,
    Initial,
    SendInitial,
    Train,
    prefixed,
    select,
)
from fedllm.scenarios.fedhomollm_party_unit import PartyUnit
from fedllm.scenarios.fedhomollm_private import PrivateTraining
from fedllm.scenarios.fedhomollm_settings import meets_drift, rule_of
from fedllm.tasks import CLASSIFICATION
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.corrections import Correction, control_variate, decoupled_proximal, next_control, proximal
from fedllm.train.optimizer import learning_rates, load_optimizer_tensors, make_optimizer, optimizer_tensors
from fedllm.wire.codecs import Codec
from fedllm.wire.frame import check_manifest
from fedllm.wire.payload import Payload, TensorMap, Tensors, manifest_of


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
        # What no message brings: it never moves, or it is the party's own and begins like this.
        first = context.model.initial(context.seed) if len(sent) < len(context.model.manifest) else {}
        self._unsent = {name: tensor for name, tensor in first.items() if name not in sent}
        self._rank: int | None = context.settings.ranks.get(context.party)
        self._kept = Kept()
        self._steps = settings.local_steps or math.ceil(
            (settings.local_epochs or 0) * self._order.steps_per_epoch / settings.gradient_accumulation_steps
        )
        self._check_weight()
        self._learning_rate = learning_rates(settings, total_steps=self._steps * context.settings.num_rounds)
        self._unit = self._party_unit()
        is_private = context.privacy.differential_privacy.is_local
        self._private = PrivateTraining(context, num_steps=self._steps) if is_private else None

    def handle(self, request: Payload, *, round_: int, deadline: float) -> Payload:
        """Return the answer to one request; see `ClientHalf`."""
        match request:
            case SendInitial():
                return Initial(adapter=self._c.model.initial(self._c.seed))
            case Train():
                return self._train(request, round_, deadline)
            case Evaluate():
                return self._evaluate(request, round_)
            case Deliver():
                return self._deliver(request)
        raise PayloadError("PAYLOAD_REFUSED", f"{type(request).__name__} is no request", where=self._c.party)

    def state(self) -> State:
        """Return the optimiser's state, if it lives on from round to round, and what else the party keeps."""
        keep = self._c.train_settings.optimizer_state == "keep"
        tensors = prefixed("optimizer", optimizer_tensors(self._optimizer)) if keep else {}
        return State(self._round, tensors | self._kept.tensors())

    def restore(self, state: State) -> None:
        """Take back what `state` returned."""
        load_optimizer_tensors(self._optimizer, select("optimizer", state.tensors))
        self._kept = Kept.of(state.tensors)
        self._round = state.round

    def _train(self, request: Train, number: int, deadline: float) -> Summand:
        c, settings = self._c, self._c.train_settings
        self._begin(request)
        start = self._started(request.adapter, number)
        if settings.optimizer_state == "reset":
            self._optimizer = make_optimizer(c.model.trainable, settings)
        moved = moving(self._rule, c.model.manifest, number)
        task = self._task(number, deadline, self._corrections(request, start))
        if self._private:
            task = replace(task, private=self._private.open(number, start, *self._remembered(request)))
        with c.model.only(moved), c.model.shrunk(number, c.settings.num_rounds):
            sums = c.trainer.train(task, self._optimizer)
        self._round = number
        end = c.model.read()
        self._keep_own(end)
        update = {name: end[name] - start[name] for name in answered(self._rule, moved, number)}
        if self._rank is not None:
            update = own_slots(update, self._rank)
        counts = self._counts(sums, number)
        if self._unit:
            update, told = self._unit.clipped(update, request.clip_norm)
            counts = {"steps": counts["steps"]} | told
        tensors = prefixed("update", update) | prefixed("control", self._control_update(request, update, number))
        whole, tensors = tensors, self._encoded(tensors, number)
        if self._unit:
            tensors = self._unit.noised(tensors, number)
        if meets_drift(c.settings):
            # Of what arrives: what a codec loses is no bias of the mean.
            arrived = select("update", self._arriving(tensors, whole, number))
            after = {name: start[name] + change for name, change in arrived.items()}
            tensors |= prefixed("drift", sketch({**start, **after}, seed=c.seed, number=number))
        return Summand(weight=self._weight(), counts=counts, tensors=tensors)

    def _counts(self, sums: TrainSums, number: int) -> dict[str, float]:
        """Return what is told of a round's training, and note it for the party."""
        rate = {"learning_rate": self._learning_rate(number * self._steps - 1)}
        if self._private:
            self._c.log(number, "train", self._private.own_values() | rate)
            return self._private.counts()
        counts = {name: float(getattr(sums, name)) for name in ("loss_nats", "tokens", "examples", "steps")}
        self._c.log(number, "train", counts | {"loss_nats": sums.loss_nats / max(sums.tokens, 1)} | rate)
        return counts

    def _remembered(self, request: Train) -> tuple[TensorMap, ...]:
        """Return all that a round starts from beside the adapter."""
        return request.control, self._kept.part("control"), optimizer_tensors(self._optimizer)

    def _was_counted(self, counted: dict[str, int]) -> bool:
        return counted.get(self._c.party, 0) == self._round

    def _begin(self, request: Train) -> None:
        """Take back what the last round changed, if the answer to it was not counted, and note what the best was."""
        self._kept.begin(was_counted=self._was_counted(request.counted))
        # What the party has of its own is as of the last round in which it was counted.
        if request.best is not None and request.best >= request.counted.get(self._c.party, 0):
            self._kept.best = self._kept.part("own")

    def _keep_own(self, end: Tensors) -> None:
        if rule_of(self._c.settings).keeps_state:
            self._kept.now["own"] = {name: end[name] for name in self._unsent}

    def _encoded(self, tensors: Tensors, number: int) -> Tensors:
        """Return what travels. With error feedback, what was lost before is added, and what is lost now is kept."""
        c, codec, lost = self._c, Codec(self._c.settings.codec), self._kept.part("lost")
        whole = {name: tensor + lost[name] if name in lost else tensor for name, tensor in tensors.items()}
        coded = codec.encode(whole, seed=c.seed, party=c.party, number=number)
        if codec.settings.error_feedback:
            arrived = self._arriving(coded, whole, number)
            self._kept.now["lost"] = lost | {name: tensor - arrived[name] for name, tensor in whole.items()}
        return coded

    def _arriving(self, coded: Tensors, whole: Tensors, number: int) -> Mapping[str, torch.Tensor]:
        """Return what the server makes of what travels."""
        return Codec(self._c.settings.codec).decode(coded, manifest_of(whole), seed=self._c.seed, number=number)

    def _whole(self, adapter: TensorMap, own: Tensors, number: int) -> TensorMap:
        """Return all that the model computes with: what was sent, and what no message brings, as of a round's end."""
        c = self._c
        plain, folded = split(adapter)
        self._check_beside(folded)
        check_manifest(plain, self._sent, sender="server")
        if rule_of(c.settings).starts_afresh:
            return {**fresh_factors(c.model.manifest, c.seed, number), **adapter}
        return {**self._unsent, **own, **adapter} if self._unsent else adapter

    def _check_beside(self, folded: Tensors) -> None:
        """Return if what stands beside the adapter may stand there."""
        folds = rule_of(self._c.settings).folds
        check_folded(folded, self._c.model.manifest if folds else {}, sender="server")

    def _started(self, adapter: TensorMap, number: int) -> TensorMap:
        """Return what local training starts from, after the model has taken it over: of LoRA the party's own slots."""
        whole = self._whole(adapter, self._kept.part("own"), number - 1)
        start = whole if self._rank is None else without_others(whole, self._rank)
        self._c.model.write(start)
        return start

    def _corrections(self, request: Train, start: TensorMap) -> list[Correction]:
        c, strategy = self._c, self._c.settings.strategy
        own = [c.pull] if c.pull else []
        if strategy.name == "SCAFFOLD":
            check_manifest(request.control, c.model.manifest, sender="server")
            zeros = {name: spec.zeros() for name, spec in c.model.manifest.items()}
            self._kept.now["control"] = self._kept.part("control") or zeros
            return [control_variate(c.model.trainable, self._kept.part("control"), request.control), *own]
        if not strategy.proximal_mu:
            return own
        pull = decoupled_proximal if strategy.proximal == "decoupled" else proximal
        return [pull(c.model.trainable, start, strategy.proximal_mu), *own]

    def _control_update(self, request: Train, update: Tensors, number: int) -> Tensors:
        if not request.control:
            return {}
        rates = sum(self._learning_rate(step) for step in range((number - 1) * self._steps, number * self._steps))
        before = self._kept.part("control")
        new = next_control(before, request.control, update, rates=rates)
        self._kept.now["control"] = before | new
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
        weight_by, examples = self._c.settings.weight_by, self._c.data.train
        if weight_by == "equal":
            return 1
        size = len(examples) if weight_by == "examples" else sum(example.num_targets for example in examples)
        unit: int = self._c.settings.weight_unit
        return -(-size // unit)

    def _party_unit(self) -> PartyUnit | None:
        c = self._c
        if c.privacy.differential_privacy.unit != "party":
            return None
        travels = {name: c.model.manifest[name] for name in answered(self._rule, c.model.manifest, 1)}
        return PartyUnit(c.settings, c.privacy, c.party, parties=len(c.parties), manifest=travels, budget=c.budget)

    def _check_weight(self) -> None:
        """Find at the start what would be found when a round is trained."""
        secure, settings = self._c.privacy.secure_aggregation, self._c.settings
        if secure.enabled and settings.weight_by != "equal" and self._weight() > secure.max_weight:
            raise PayloadError(
                "SUM_OVERFLOW",
                f"the party's weight by {settings.weight_by} is above max_weight, {secure.max_weight}",
                where=f"party {self._c.party}",
                fix="raise `federation.weight_unit` or `max_weight`, or set `federation.weight_by: equal`",
            )

    def _evaluate(self, request: Evaluate, number: int) -> Summand:
        c = self._c
        own = self._kept.part("own", was_counted=self._was_counted(request.counted))
        c.model.write(self._whole(request.adapter, own, number))
        examples = c.data.held_out if request.split == "held_out" else c.data.common
        sums = evaluate_examples(c.model.model, examples, pad_id=c.pad_id, batch_size=c.eval_batch_size)
        if sums.tokens:
            c.log(number, request.split, sums.values())
        if self._unit and request.split == "held_out":
            # These would tell of the party without noise.
            sums = LossSums(0.0, 0, 0, 0)
        counts = {"nll_nats": sums.nll_nats, "tokens": sums.tokens, "bytes": sums.bytes, "examples": sums.examples}
        if c.data_settings.task == CLASSIFICATION:
            counts |= {"choices": sums.choices, "correct": sums.correct}
        return Summand(weight=1, counts={name: float(value) for name, value in counts.items()}, tensors={})

    def _deliver(self, request: Deliver) -> Delivered:
        own = self._kept.part("own", was_counted=self._was_counted(request.counted))
        if request.delivered < request.counted.get(self._c.party, 0):
            own = self._kept.best
        self._c.deliver(dict(self._whole(request.adapter, own, request.delivered)))
        return Delivered()
