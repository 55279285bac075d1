"""Attack a run as an outsider would, on the party's own machine: counts and rates come out, never an example."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.data.read import PartyData
from fedllm.data.tokens import TokenisedExample
from fedllm.errors import ConfigError
from fedllm.evaluate.loss import example_losses
from fedllm.job.check import check_job
from fedllm.job.job import Job, LocatedParty, load_parties
from fedllm.privacy.auditing import SIGNIFICANCE, LowerBound, group_claim, largest_bound, one_run_audit
from fedllm.privacy.budget import Purse
from fedllm.privacy.canaries import CanaryMaker, CanarySet
from fedllm.privacy.membership import area_under_curve, exposure, membership
from fedllm.runs.folder import CANARIES, RunFolder, check_free
from fedllm.runs.jsonl import write_json
from fedllm.runs.metrics import run_rows
from fedllm.runs.plan_files import read_plan, write_plan
from fedllm.runtime.judge import final_models, final_tensors
from fedllm.runtime.local import InProcessLink, local_hosts
from fedllm.runtime.run import Watch, carry_out, concluding, read_result
from fedllm.runtime.site import PURSE_FOLDER, Site, data_settings, open_site, party_examples, party_tokens
from fedllm.scenarios.base import TokenData
from fedllm.seeds import stream
from fedllm.wire.payload import Tensors

_FOUND = "audit.json"
# Members and non-members that are looked at, and canaries that none was planted of.
_MOST_EXAMPLES = 1000
_DECOYS = 1000
# Where no delta is claimed.
_DELTA = 1e-5


@dataclass(frozen=True)
class Claim:
    """What a job promises of each unit: an example, a person's examples (group), or a party."""

    epsilon: float
    delta: float
    unit: str

    def for_copies(self, copies: int) -> tuple[float, float]:
        """Return (epsilon, delta) for a canary that is planted several times; only examples are hidden one by one."""
        return group_claim(self.epsilon, self.delta, copies if self.unit == "example" else 1)


@dataclass(frozen=True)
class Audit:
    """What an audit found; `refutes_claim` is whether more was lost than that, None where it claims nothing.

    `membership` has a row for each party on this machine; `canaries` is None where none were planted.
    """

    run: Path
    claim: Claim | None
    membership: list[dict[str, Any]]
    canaries: dict[str, Any] | None
    refutes_claim: bool | None

    def values(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        return asdict(self) | {"run": str(self.run)}


def claimed(job: Job, run: Path) -> Claim | None:
    """Return the differential privacy that a job claims; None where it claims none, or not here.

    Args:
        job: The job.
        run: Its run folder. Where the job names the noise and not epsilon, what was spent is there.
    """
    asked = job.privacy.differential_privacy
    if asked.unit == "none":
        return None
    epsilon, delta, _ = asked.limits
    if math.isinf(epsilon):
        spent = [row["value"] for row in run_rows(run) if row["name"] == "epsilon_spent"]
        if not spent:
            return None
        # Each party hides its own examples: the largest holds for all.
        epsilon = max(spent)
    return Claim(epsilon, delta, asked.unit)


def audit_job(
    job: Job,
    *,
    parties: list[LocatedParty] | None = None,
    canaries: int = 200,
    copies: int = 1,
    output: Path | None = None,
    watch: Watch | None = None,
) -> Audit:
    """Plant canaries among the parties' training examples, run the job as it is, and return what it gives away.

    Each canary is planted or not by a fair coin. The run is for the audit alone: its adapter knows canaries.

    Args:
        job: The job.
        parties: Its party files; by default `parties/NAME.yaml` beside the job file.
        canaries: Canaries of all parties together.
        copies: How often each is planted. A claim for an example is then that for a group of so many.
        output: The run folder; by default `runs/NAME-DIGEST-audit`.
        watch: Callbacks for a live view.

    Raises:
        FedllmError: See its code.
    """
    parties = parties if parties is not None else load_parties(job)
    check_job(job, parties)
    path = output or Path("runs") / f"{job.name}-{job.digest[:8]}-audit"
    check_free(path)
    site = _open(job, parties, path)
    reads = {located.party.name: party_examples(job, located) for located in parties}
    plan = _plan(reads, canaries=canaries, copies=copies)
    data = _planted(site, parties, plan, reads)
    run = RunFolder.create(path, job_digest=job.digest)
    try:
        # Before the run can be resumed, it is known as an audit's.
        write_json(path / CANARIES, plan)
        write_plan(run, job, parties)
        _carry_out(run, site, parties, data, watch)
    finally:
        run.close()
    return _audit(path, site, parties, plan)


def audit_run(path: Path, *, watch: Watch | None = None) -> Audit:
    """Return what a finished run gives away of the data of the parties on this machine.

    An audit of a job that broke off is gone on with.

    Args:
        path: The run folder.
        watch: Callbacks for a live view.

    Raises:
        ConfigError: `RUN_UNFINISHED`, or `DATA_EMPTY` where there is nothing to compare.
    """
    job, parties = read_plan(path)
    file, result = path / CANARIES, read_result(path)
    plan = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if plan and not (result and result.is_finished):
        _go_on(path, _open(job, parties, path), parties, plan, watch)
    final_tensors(path, job)
    return _audit(path, open_site(job, parties), parties, plan)


def _open(job: Job, parties: list[LocatedParty], path: Path) -> Site:
    # What is spent in an audit is not released, so the sites' own ledgers have no part in it.
    purses = {located.party.name: Purse(path / PURSE_FOLDER) for located in parties}
    return replace(open_site(job, parties), purses=purses)


def _go_on(path: Path, site: Site, parties: list[LocatedParty], plan: Mapping[str, Any], watch: Watch | None) -> None:
    reads = {located.party.name: party_examples(site.job, located) for located in parties}
    data = _planted(site, parties, plan, reads)
    run = RunFolder.open(path)
    try:
        run.event("run_resumed")
        _carry_out(run, site, parties, data, watch)
    finally:
        run.close()


def _carry_out(
    run: RunFolder, site: Site, parties: list[LocatedParty], data: Mapping[str, TokenData], watch: Watch | None
) -> None:
    with concluding(run):
        hosts = local_hosts(site, data, run, on_step=(watch or Watch()).on_step)
        carry_out(run, site.job, parties, InProcessLink(hosts), watch=watch)


def _plan(reads: Mapping[str, PartyData], *, canaries: int, copies: int) -> dict[str, Any]:
    """Return how many canaries of which form each party gets: as many each, and the first ones the rest."""
    each, rest = divmod(canaries, len(reads))
    parties = {
        name: {"kind": read.train[0].kind, "canaries": each + (place < rest)}
        for place, (name, read) in enumerate(reads.items())
    }
    return {"copies": copies, "parties": parties}


def _planted(
    site: Site, parties: list[LocatedParty], plan: Mapping[str, Any], reads: Mapping[str, PartyData]
) -> dict[str, TokenData]:
    """Return each party's tokens with its canaries among them."""
    sets, data = _canary_sets(site, plan), {}
    for located in parties:
        name = located.party.name
        tokens = party_tokens(site, located, read=reads[name])
        data[name] = replace(tokens, train=[*tokens.train, *sets[name].planted(plan["copies"])])
    return data


def _canary_sets(site: Site, plan: Mapping[str, Any]) -> dict[str, CanarySet]:
    maker = CanaryMaker(site.base.tokenizer, data_settings(site.job), seed=site.job.seed)
    decoys = max(100, _DECOYS // len(plan["parties"]))
    return {
        party: maker.make(party, entry["kind"], number=entry["canaries"], decoys=decoys)
        for party, entry in plan["parties"].items()
    }


def _audit(path: Path, site: Site, parties: list[LocatedParty], plan: Mapping[str, Any] | None) -> Audit:
    attack = _Attack(site, final_models(path, site))
    rows = [row for located in parties if (row := attack.membership(located))]
    if not rows and plan is None:
        raise ConfigError(
            "DATA_EMPTY",
            "no party on this machine holds examples out, so there is nothing to compare its training examples with",
            where=str(path),
            fix="set `data.eval` or `data.eval_share` in party.yaml, or audit the job: `fedllm audit job.yaml`",
        )
    claim = claimed(site.job, path)
    found = attack.canaries(_canary_sets(site, plan), plan["copies"], claim) if plan else None
    passes = None
    if claim and found:
        passes = found["epsilon_lower_bound"] > found["claimed_epsilon"]
    audit = Audit(path, claim, rows, found, passes)
    write_json(path / _FOUND, audit.values())
    return audit


@dataclass(frozen=True)
class _Attack:
    """The attacks on what a run delivers: (name, party, tensors), with no party where one adapter is for all."""

    site: Site
    models: Sequence[tuple[str, str | None, Tensors]]

    def membership(self, located: LocatedParty) -> dict[str, Any] | None:
        """Return how well training examples are told from held-out ones; None where one of the two is not there."""
        party = located.party.name
        data = party_tokens(self.site, located)
        members, others = (self._some(party, split) for split in (data.train, data.held_out))
        if not members or not others or not self._is_here(party):
            return None
        plain, against = zip(*(self._losses(party, examples) for examples in (members, others)), strict=True)
        found = membership(against[0] - plain[0], against[1] - plain[1])
        by_loss = area_under_curve(-plain[0], -plain[1])
        return {"party": party, **asdict(found), "auc_by_loss_alone": by_loss}

    def canaries(self, sets: Mapping[str, CanarySet], copies: int, claim: Claim | None) -> dict[str, Any]:
        """Return the lower bound of epsilon over all parties' canaries, and how exposed the planted ones are."""
        tried = [self._tried(party, found) for party, found in sets.items() if self._is_here(party)]
        scores, included = (np.concatenate([getattr(each, name) for each in tried]) for name in ("scores", "included"))
        epsilon, delta = claim.for_copies(copies) if claim else (None, _DELTA)
        values = _bound_values(one_run_audit(scores, included, delta=delta))
        planted = {"canaries": len(included), "planted": int(included.sum()), "copies": copies}
        return planted | {"claimed_epsilon": epsilon} | values | _exposure_values(tried)

    def _tried(self, party: str, found: CanarySet) -> _Tried:
        tuned, base = self._losses(party, [*found.canaries, *found.decoys])
        change, others = np.split(tuned - base, [len(found.canaries)])
        # Those that the coin left out are as good as decoys.
        reference = np.concatenate([others, change[~found.included]])
        return _Tried(-change, found.included, exposure(change[found.included], reference), len(reference) + 1)

    def _is_here(self, party: str) -> bool:
        return any(owner in (None, party) for _, owner, _ in self.models)

    def _some(self, party: str, examples: Sequence[TokenisedExample]) -> list[TokenisedExample]:
        """Return all examples, or so many of them drawn by name."""
        if len(examples) <= _MOST_EXAMPLES:
            return list(examples)
        chosen = stream(self.site.job.seed, "audited", party).permutation(len(examples))[:_MOST_EXAMPLES]
        return [examples[i] for i in sorted(chosen)]

    def _losses(self, party: str, examples: Sequence[TokenisedExample]) -> tuple[np.ndarray, np.ndarray]:
        """Return each example's loss under the party's tuned model, and under the bare base model, in nats."""
        tensors = next(tensors for _, owner, tensors in self.models if owner in (None, party))
        site = self.site
        pad_id, size = site.base.tokenizer.pad_token_id, site.job.evaluate.per_device_eval_batch_size
        site.model.write(tensors)
        tuned = example_losses(site.model.model, examples, pad_id=pad_id, batch_size=size)
        with site.model.untuned() as model:
            return tuned, example_losses(model, examples, pad_id=pad_id, batch_size=size)


@dataclass(frozen=True)
class _Tried:
    """A party's canaries under attack: the higher a score, the rather it was planted; exposure in bits, of so many."""

    scores: np.ndarray
    included: np.ndarray
    exposure_bits: np.ndarray
    among: int


def _bound_values(bound: LowerBound) -> dict[str, Any]:
    return {
        "epsilon_lower_bound": bound.epsilon,
        "delta": bound.delta,
        "confidence": 1 - SIGNIFICANCE,
        # A bound near it says that there were too few canaries.
        "largest_possible_bound": largest_bound(bound.best.canaries, bound.delta),
        "guesses": bound.best.guesses,
        "correct": bound.best.correct,
    }


def _exposure_values(tried: Sequence[_Tried]) -> dict[str, Any]:
    bits = np.concatenate([each.exposure_bits for each in tried])
    first = sum(int((each.exposure_bits >= math.log2(each.among) - 1e-9).sum()) for each in tried)
    return {
        "exposure_bits_mean": float(bits.mean()),
        "exposure_bits_max": float(bits.max()),
        "exposure_bits_possible": math.log2(max(each.among for each in tried)),
        "ranked_first": first,
    }
