"""FedHomoLLM: all parties hold the same base model and tune one adapter together by federated averaging.

Source: Fan et al. 2023, arXiv:2310.10049, section 3.1 (FedHomoLLM); FedAvg of McMahan et al. 2017,
arXiv:1602.05629, algorithm 1, on PEFT parameters. Differs: the weighted sum is exact (integers on a grid),
so that its bits do not depend on the order of arrival; FedAvgM (Hsu et al. 2019) is offered beside FedAvg.

A round: Train -> sum of updates -> server optimiser -> Evaluate -> sum of losses. Each sum is a `total`, so the
server half needs no single party's update, but for the robust rules and those rules for LoRA's factors that say so in
their table (`fedllm.aggregate.rules`), which `ask`. These, the strategies (`fedllm.aggregate.server`) and the codecs
(`fedllm.wire.codecs`) are settings of this conversation.

SCAFFOLD (Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1, option II) differs in two things: its means are
weighted as `weight_by` says, and a party whose answer was not counted goes back to the control variate before it, so
that c stays the mean of the c_i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedllm.aggregate.each import combined
from fedllm.aggregate.folded import grown_bytes, split
from fedllm.aggregate.lora import drift, travelling
from fedllm.aggregate.robust import RobustSettings, Update, robust_mean
from fedllm.aggregate.server import StrategySettings, server_step
from fedllm.aggregate.slots import num_slots, slot_means
from fedllm.errors import BudgetExhausted, RunFailed, RunPaused
from fedllm.models.fresh import fresh_factors
from fedllm.privacy.budget import Budget
from fedllm.privacy.settings import PrivacySettings
from fedllm.scenarios.base import (
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
from fedllm.scenarios.fedhomollm_clashes import clashes
from fedllm.scenarios.fedhomollm_client import Client
from fedllm.scenarios.fedhomollm_down import as_sent, sent
from fedllm.scenarios.fedhomollm_messages import (
    Deliver,
    Delivered,
    Evaluate,
    Initial,
    SendInitial,
    Split,
    Train,
    prefixed,
    private,
    select,
)
from fedllm.scenarios.fedhomollm_party_unit import ServerNoise, first_clip
from fedllm.scenarios.fedhomollm_rows import loss_rows, loss_sums, rows_of, train_rows
from fedllm.scenarios.fedhomollm_settings import Settings, needs_each, rule_of
from fedllm.scenarios.fedhomollm_trust import who_learns_what
from fedllm.seeds import stream
from fedllm.wire.codecs import CodecSettings
from fedllm.wire.patch import DownSettings
from fedllm.wire.payload import Manifest, Payload, Tensors, manifest_of

_BUDGET_FIXES = {
    "BUDGET_EXHAUSTED": "run fewer rounds or with a smaller epsilon, or ask the site for a larger `limits.max_epsilon`",
    "BUDGET_OTHER_UNIT": "hide the unit that earlier runs on the party's data hid; its own log says which",
}


@dataclass(frozen=True)
class Settled:
    """A round's new global tensors, and what is to be noted of how they came about."""

    tensors: Tensors
    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


# (global tensors after the server's step, round) -> those that the round ends with.
Settle = Callable[[Tensors, int], Settled]


def as_it_stands(tensors: Tensors, number: int) -> Settled:
    """Return the tensors: nobody changes them.

    Args:
        tensors: The global ones.
        number: The round.
    """
    return Settled(tensors)


class Server:
    """The server's half. It needs neither the base model nor any data."""

    def __init__(
        self,
        settings: Settings,
        *,
        seed: int,
        common: bool,
        privacy: PrivacySettings | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._settings, self._seed, self._common = settings, seed, common
        asked = privacy.differential_privacy if privacy else None
        self._noise = ServerNoise(settings, asked, budget) if asked and asked.unit == "party" else None
        self._first_clip = first_clip(asked) if asked and self._noise else None

    def start(self, federation: Federation) -> RoundResult:
        """Return the state of round 0: the initial adapter, evaluated."""
        if self._noise:
            self._noise.check(len(federation.parties))
        party = federation.parties[0]
        for reply in federation.ask(SendInitial(), round_=0, to=[party]):
            if isinstance(reply.payload, Initial):
                state = State(0, prefixed("adapter", reply.payload.adapter), {"best": None, "best_loss": None})
                return self._evaluated(federation, state, rows=[], failures={})
            raise RunFailed(
                getattr(reply.payload, "code", "PARTY_FAILED"), "no initial adapter was made", where=f"party {party}"
            )
        raise RunPaused("QUORUM", "no answer to the request for the initial adapter", where=f"party {party}")

    def round(self, federation: Federation, state: State, *, settle: Settle = as_it_stands) -> RoundResult:
        """Return the state after one round of local training.

        Args:
            federation: The parties.
            state: Of the round before.
            settle: Changes what stands beside the adapter before anybody is sent it.
        """
        number, settings = state.round + 1, self._settings
        adapter, control = select("adapter", state.tensors), self._control(state)
        counted = state.fields.get("counted", {})
        # So that a party puts its own factor of the best round aside before it trains on.
        best = state.fields["best"] if rule_of(settings).keeps_state and settings.keep == "best" else None
        clip = state.fields.get("clip_norm", self._first_clip)
        request = Train(adapter=sent(settings, state), control=control, counted=counted, best=best, clip_norm=clip)
        total, clip_after, spent = self._noisy(self._gathered(federation, request, number, adapter), number, clip)
        update, control_update = select("update", total.means), select("control", total.means)
        share = len(total.parties) / len(federation.parties)
        control = control | {name: control[name] + share * change for name, change in control_update.items()}
        rows = train_rows(number, replace(total, means=update)) + self._saved_rows(number, total, adapter)
        rows += _added_rows(number, total) + spent
        if met := select("drift", total.means):
            value = drift(met, adapter, update, seed=self._seed, number=number)
            rows += rows_of(number, None, None, {"lora_drift": value})
        moved, memory = server_step(adapter, select("server", state.tensors), update, settings=settings.strategy)
        if rule_of(settings).folds:
            moved = self._beside(moved, select("beside", total.means), number)
        settled = settle(moved, number)
        moved, rows, failures = settled.tensors, rows + settled.rows, total.failures | settled.failures
        tensors = prefixed("adapter", moved) | prefixed("server", memory) | prefixed("control", control)
        tensors, note = as_sent(settings, state, tensors, number)
        fields = state.fields | note | self._counted_after(counted, total, number) | clip_after
        new = State(number, tensors | _best_so_far(state), fields)
        return self._handed_over(federation, self._evaluated(federation, new, rows=rows, failures=failures))

    def _noisy(self, total: Total, number: int, clip: float | None) -> tuple[Total, dict[str, float], list[Row]]:
        """Return the sum with the server's noise, the field that says the next clip norm, and what was spent."""
        if self._noise is None or clip is None:
            return total, {}, []
        noisy, after = self._noise.added(total, number, clip)
        return noisy, {"clip_norm": after}, self._noise.rows(number, clip)

    def _counted_after(self, counted: Mapping[str, int], total: Total, number: int) -> dict[str, dict[str, int]]:
        """Return the field that says when each party's answer was last counted, where parties keep something."""
        settings = self._settings
        own = rule_of(settings).keeps_state or settings.strategy.name == "SCAFFOLD"
        keeps = own or settings.codec.error_feedback
        return {"counted": {**counted, **dict.fromkeys(total.parties, number)}} if keeps else {}

    def _gathered(self, federation: Federation, request: Train, number: int, adapter: Tensors) -> Total:
        """Return the mean update of a round, or what the settings put in its place."""
        settings, whole = self._settings, _tuned(adapter)

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
        updates = [Update(party, found.weight, select("update", found.tensors)) for party, found in answers]
        if settings.robust.name != "none":
            return replace(total, means=prefixed("update", robust_mean(adapter, updates, settings.robust)))
        found = combined(settings.lora_rule, adapter, updates)
        norm = {"added": torch.tensor(found.added_norm)} if rule_of(settings).folds else {}
        return replace(total, means=prefixed("update", found.change) | prefixed("beside", found.folded) | norm)

    def _beside(self, adapter: Tensors, folded: Tensors, number: int) -> Tensors:
        """Return the global state with what stands beside the adapter after a round."""
        plain, _ = split(adapter)
        if rule_of(self._settings).starts_afresh:
            plain |= fresh_factors(manifest_of(plain), self._seed, number)
        return plain | folded

    def _saved_rows(self, number: int, total: Total, adapter: Tensors) -> list[Row]:
        whole = _tuned(adapter)
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
        adapter, _ = split(select("adapter", state.tensors))
        return select("control", state.tensors) or {name: torch.zeros_like(t) for name, t in adapter.items()}

    def final(self, state: State) -> tuple[Tensors, int]:
        """Return the adapter to deliver and its round; no tensors where each party has a model of its own."""
        tensors, number = self._delivered(state)
        return ({} if rule_of(self._settings).keeps_state else tensors), number

    def _delivered(self, state: State) -> tuple[Tensors, int]:
        best = state.fields["best"]
        if self._settings.keep == "best" and best is not None and best != state.round:
            return select("best", state.tensors), int(best)
        return select("adapter", state.tensors), state.round

    def _handed_over(self, federation: Federation, result: RoundResult) -> RoundResult:
        """Return the result of a round, after the last one has given each party an adapter where it has its own."""
        state, settings = result.state, self._settings
        if state.round < settings.num_rounds or not rule_of(settings).keeps_state:
            return result
        adapter, number = self._delivered(state)
        shared = {name: adapter[name] for name in travelling(settings.lora_rule, adapter)}
        request = Deliver(adapter=shared, counted=state.fields["counted"], delivered=number)
        failures = dict(result.failures)
        for reply in federation.ask(request, round_=state.round, to=federation.parties):
            if not isinstance(reply.payload, Delivered):
                failures[reply.party] = getattr(reply.payload, "code", "PAYLOAD_REFUSED")
        return replace(result, failures=failures)

    def _cohort(self, parties: tuple[str, ...], number: int) -> list[str]:
        size = self._settings.cohort_size(len(parties))
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
        for code, fix in _BUDGET_FIXES.items():
            if code in total.failures.values():
                raise BudgetExhausted(code, f"{what} ({failed})", where=f"round {number}", fix=fix)
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
        parties = federation.parties
        totals: dict[Split, Total] = {"held_out": self._evaluate(federation, state, "held_out", parties)}
        if self._common:
            # The common set is the same everywhere, so of one model one party's word is enough; they take turns.
            one = (parties[state.round % len(parties)],)
            to = parties if rule_of(self._settings).keeps_state else one
            totals["common"] = self._evaluate(federation, state, "common", to)
        rows = rows + [row for split, total in totals.items() for row in loss_rows(state.round, split, total)]
        failures = dict(failures) | {p: code for total in totals.values() for p, code in total.failures.items()}
        return RoundResult(_with_best(state, totals["held_out"]), rows, failures)

    def _evaluate(self, federation: Federation, state: State, split: Split, to: tuple[str, ...]) -> Total:
        adapter = sent(self._settings, state)
        counted = state.fields.get("counted", {}) if rule_of(self._settings).keeps_state else {}
        request = Evaluate(adapter=adapter, split=split, counted=counted)
        return federation.total(request, round_=state.round, to=to, manifest={})


def _tuned(adapter: Tensors) -> Manifest:
    return manifest_of(split(adapter)[0])


def _added_rows(number: int, total: Total) -> list[Row]:
    if "added" not in total.means:
        return []
    return rows_of(number, None, None, {"folded_norm": float(total.means["added"])})


def _with_best(state: State, held_out: Total) -> State:
    sums = loss_sums(held_out)
    best_loss = state.fields["best_loss"]
    if not sums.tokens or (best_loss is not None and sums.loss_nats >= best_loss):
        return state
    # While the newest adapter is the best one it is not kept twice; `_best_so_far` copies it when it moves on.
    tensors = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("best/")}
    return State(state.round, tensors, state.fields | {"best": state.round, "best_loss": sums.loss_nats})


def _best_so_far(state: State) -> Tensors:
    source = "adapter" if state.fields["best"] == state.round else "best"
    return prefixed("best", select(source, state.tensors))


def alone(settings: ScenarioSettings) -> Settings:
    """Return the settings of a yardstick: one party that trains for as many rounds, without server momentum.

    Args:
        settings: The federation's.
    """
    plain: dict[str, Any] = {
        "strategy": StrategySettings(),
        "robust": RobustSettings(),
        "codec": CodecSettings(),
        "codec_down": DownSettings(),
        "lora_rule": "FedIT",
        "ranks": {},
    }
    changes = {"min_parties": 1, "fraction_train": 1.0} | plain
    kind = type(settings) if isinstance(settings, Settings) else Settings
    return kind.model_validate(settings.model_dump() | changes)


def unused(settings: Settings) -> tuple[type[Payload], ...]:
    """Return the requests that a job does not make.

    Args:
        settings: The scenario's.
    """
    return () if rule_of(settings).keeps_state else (Deliver,)


def grown(settings: Settings, adapter: Manifest, number: int, parties: Sequence[str]) -> int:
    """Return by how many bytes a request is longer than the adapter after so many rounds, at most.

    With FedEx-LoRA a round adds (N - 1) r columns to each site, with FLoRA the ranks of all N that train, until there
    are as many as the site has rows or columns.

    Args:
        settings: The scenario's.
        adapter: The tensors that are tuned.
        number: The round.
        parties: The job's.
    """
    if not rule_of(settings).folds:
        return 0
    rank = num_slots(adapter)
    highest = sorted((settings.ranks.get(party, rank) for party in parties), reverse=True)
    ranks = highest[: settings.cohort_size(len(parties))]
    added = sum(ranks) if rule_of(settings).starts_afresh else sum(ranks[1:])
    return grown_bytes(adapter, number * added)


SCENARIO = Scenario(
    settings=Settings,
    requests=(SendInitial, Train, Evaluate, Deliver),
    unused=unused,
    grown=grown,
    replies=(Initial, Summand, Delivered),
    server=Server,
    client=Client,
    alone=alone,
    clashes=clashes,
    answer=answer,
    who_learns_what=who_learns_what,
    private=private,
)
