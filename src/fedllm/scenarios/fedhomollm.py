"""FedHomoLLM: all parties hold the same base model and tune one adapter together by federated averaging.

Source: Fan et al. 2023, arXiv:2310.10049, section 3.1 (FedHomoLLM); FedAvg of McMahan et al. 2017,
arXiv:1602.05629, algorithm 1, on PEFT parameters. Differs: the weighted sum is exact (integers on a grid),
so that its bits do not depend on the order of arrival; FedAvgM (Hsu et al. 2019) is offered beside FedAvg.

A round: Train -> sum of updates -> server optimiser -> Evaluate -> sum of losses. Each sum is a `total`, so the
server half never needs a single party's update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedllm.aggregate.server import StrategySettings, fedavgm
from fedllm.data.batches import BatchOrder
from fedllm.errors import PayloadError, RunFailed, RunPaused
from fedllm.evaluate.loss import LossSums, evaluate_examples
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
)
from fedllm.seeds import stream
from fedllm.train.base import TrainTask
from fedllm.train.optimizer import learning_rates, load_optimizer_tensors, make_optimizer, optimizer_tensors
from fedllm.wire.frame import check_manifest
from fedllm.wire.payload import Payload, TensorMap, Tensors, manifest_of

Split = Literal["held_out", "common"]


class Settings(ScenarioSettings):
    """The job's `federation` section for FedHomoLLM."""

    strategy: StrategySettings = Field(StrategySettings(), description="The server's optimiser.")
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
        number = state.round + 1
        adapter = _select("adapter", state.tensors)
        cohort = self._cohort(federation.parties, number)
        total = federation.total(Train(adapter=adapter), round_=number, to=cohort, manifest=manifest_of(adapter))
        self._check_quorum(total, number)
        strategy = self._settings.strategy
        adapter, momentum = fedavgm(adapter, _select("momentum", state.tensors), total.means, settings=strategy)
        tensors = _prefixed("adapter", adapter) | _prefixed("momentum", momentum) | _best_so_far(state)
        rows = _train_rows(number, total)
        return self._evaluated(federation, State(number, tensors, state.fields), rows=rows, failures=total.failures)

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
        if len(total.parties) >= self._settings.min_parties:
            return
        failed = ", ".join(f"{party}: {code}" for party, code in sorted(total.failures.items()))
        what = f"{len(total.parties)} parties finished, federation.min_parties is {self._settings.min_parties}"
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
        adapter = _select("adapter", state.tensors)
        parties = federation.parties
        totals: dict[Split, Total] = {"held_out": _evaluate(federation, adapter, "held_out", state.round, parties)}
        if self._common:
            # The common set is the same everywhere, so one party's word is enough; they take turns.
            one = (parties[state.round % len(parties)],)
            totals["common"] = _evaluate(federation, adapter, "common", state.round, one)
        rows = rows + [row for split, total in totals.items() for row in _loss_rows(state.round, split, total)]
        failures = dict(failures) | {p: code for total in totals.values() for p, code in total.failures.items()}
        return RoundResult(_with_best(state, totals["held_out"]), rows, failures)


def _evaluate(federation: Federation, adapter: Tensors, split: Split, number: int, to: tuple[str, ...]) -> Total:
    return federation.total(Evaluate(adapter=adapter, split=split), round_=number, to=to, manifest={})


def _with_best(state: State, held_out: Total) -> State:
    sums = _loss_sums(held_out)
    best_loss = state.fields["best_loss"]
    if not sums.tokens or (best_loss is not None and sums.loss_nats >= best_loss):
        return state
    # While the newest adapter is the best one it is not kept twice; `_best_so_far` copies it when it moves on.
    tensors = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("best/")}
    return State(state.round, tensors, {"best": state.round, "best_loss": sums.loss_nats})


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
        """Return the local optimiser's state, empty if it does not live on from round to round."""
        keep = self._c.train_settings.optimizer_state == "keep"
        return State(self._round, optimizer_tensors(self._optimizer) if keep else {})

    def restore(self, state: State) -> None:
        """Take back the optimiser's state."""
        load_optimizer_tensors(self._optimizer, state.tensors)
        self._round = state.round

    def _train(self, request: Train, number: int, deadline: float) -> Summand:
        c, settings = self._c, self._c.train_settings
        check_manifest(request.adapter, c.model.manifest, sender="server")
        c.model.write(request.adapter)
        if settings.optimizer_state == "reset":
            self._optimizer = make_optimizer(c.model.trainable, settings)
        sums = c.trainer.train(self._task(number, deadline), self._optimizer)
        self._round = number
        update = {name: tensor - request.adapter[name] for name, tensor in c.model.read().items()}
        counts = {name: float(getattr(sums, name)) for name in ("loss_nats", "tokens", "examples", "steps")}
        last_rate = self._learning_rate(number * self._steps - 1)
        mean = {"loss_nats": sums.loss_nats / max(sums.tokens, 1), "learning_rate": last_rate}
        c.log(number, "train", counts | mean)
        return Summand(weight=self._weight(), counts=counts, tensors=update)

    def _task(self, number: int, deadline: float) -> TrainTask:
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
        )

    def _weight(self) -> int:
        weight_by = self._c.settings.weight_by
        if weight_by == "tokens":
            return sum(sum(example.loss_mask[1:]) for example in self._c.data.train)
        return len(self._c.data.train) if weight_by == "examples" else 1

    def _evaluate(self, request: Evaluate, number: int) -> Summand:
        c = self._c
        check_manifest(request.adapter, c.model.manifest, sender="server")
        c.model.write(request.adapter)
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
    changes = {"min_parties": 1, "fraction_train": 1.0, "strategy": StrategySettings()}
    return Settings.model_validate(settings.model_dump() | changes)


SCENARIO = Scenario(
    settings=Settings,
    requests=(SendInitial, Train, Evaluate),
    replies=(Initial, Summand),
    server=Server,
    client=Client,
    alone=alone,
    who_learns_what=(
        "The server sees each party's update (no secure aggregation yet), the sums of losses and counts, and the "
        "global adapter.",
        "Each party sees the global adapter after every round; never another party's update or data.",
        "Rows, prompts and completions never leave a party. Updates can leak something of them: see the threat model.",
    ),
)
