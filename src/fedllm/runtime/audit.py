"""Attack a run as an outsider would, on the party's own machine: counts and rates come out, never an example."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedllm.data.read import PartyData
from fedllm.errors import ConfigError, ModelError
from fedllm.job.check import check_job
from fedllm.job.job import Job, LocatedParty, load_parties
from fedllm.job.loading import load_model
from fedllm.job.party import Party
from fedllm.models.deliver import WEIGHTS, read_adapter
from fedllm.ownership.settings import OwnershipSettings
from fedllm.privacy.budget import PURSE_FOLDER, Purse
from fedllm.privacy.canaries import CanaryMaker, CanarySet
from fedllm.runs.digests import renew
from fedllm.runs.folder import CANARIES, RunFolder, check_free
from fedllm.runs.jsonl import write_json
from fedllm.runs.metrics import run_rows
from fedllm.runs.plan_files import read_plan, write_plan
from fedllm.runtime.attacks import Attack, Claim
from fedllm.runtime.delivery import need_adapter
from fedllm.runtime.judge import final_models, final_tensors
from fedllm.runtime.local import InProcessLink, local_hosts
from fedllm.runtime.opening import trainer_for
from fedllm.runtime.overheard import Listener, update_rows
from fedllm.runtime.run import Watch, carry_out, concluding, read_result
from fedllm.runtime.site import Site, data_settings, open_site, party_examples, party_tokens
from fedllm.scenarios.base import TokenData

_FOUND = "audit.json"
# Canaries that none was planted of, of all parties together.
_DECOYS = 1000


@dataclass(frozen=True)
class Audit:
    """What an audit found; `refutes_claim` is whether more was lost than the job claims, None where it claims nothing.

    `membership` has a row for each party on this machine; `canaries` is None where none were planted. `updates` has a
    row for each update that was attacked on its way to the server; there are none of a run that was not an audit's.
    """

    run: Path
    claim: Claim | None
    membership: list[dict[str, Any]]
    canaries: dict[str, Any] | None
    refutes_claim: bool | None
    updates: list[dict[str, Any]]

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


def audit_job(  # noqa: PLR0913 - each is an option of the command
    job: Job,
    *,
    parties: list[LocatedParty] | None = None,
    canaries: int = 200,
    copies: int = 1,
    texts: int = 20_000,
    output: Path | None = None,
    watch: Watch | None = None,
) -> Audit:
    """Plant canaries among the parties' training examples, run the job as it is, and return what it gives away.

    Each canary is planted or not by a fair coin. The adapter of the last round is judged, also where the job delivers
    the best one: every party sees all of them. The run is for the audit alone: its adapter knows canaries. In the first
    and the last round it is tried which words can be read off the updates, as the server gets them.

    Args:
        job: The job.
        parties: Its party files; by default `parties/NAME.yaml` beside the job file.
        canaries: Canaries of all parties together.
        copies: How often each is planted. A claim for an example is then that for a group of so many.
        texts: How many texts are tried for an update that the span test cannot read, each in a pass of one example.
        output: The run folder; by default `runs/NAME-DIGEST-audit`.
        watch: Callbacks for a live view.

    Raises:
        FedllmError: See its code.
    """
    parties = parties if parties is not None else load_parties(job)
    job = _to_the_end(job)
    check_job(job, parties)
    path = output or Path("runs") / f"{job.name}-{job.digest[:8]}-audit"
    check_free(path)
    site = _open(job, parties, path)
    reads = {located.party.name: party_examples(job, located) for located in _training(job, parties)}
    plan = _plan(reads, canaries=canaries, copies=copies) | {"texts": texts}
    data = _planted(site, parties, plan, reads)
    run = RunFolder.create(path, job_digest=job.digest)
    try:
        # Before the run can be resumed, it is known as an audit's.
        write_json(path / CANARIES, plan)
        write_plan(run, job, parties)
        _carry_out(run, site, parties, data, plan, watch)
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
    need_adapter(path, job)
    return _audit(path, open_site(job, parties), parties, plan)


def audit_adapter(job: Job, adapter: Path, *, party: Path) -> Audit:
    """Return what a delivered LoRA adapter gives away of one party's data; nothing is written.

    For a site between machines, which has no run folder of its own.

    Args:
        job: The job that the adapter was tuned by.
        adapter: Its folder, in PEFT's layout.
        party: The site's own party.yaml.

    Raises:
        ModelError: `PEFT_TARGET`, the adapter is not of the job's kind and size.
    """
    found, _ = load_model(Party, party, overrides=[])
    located = LocatedParty(party=found, base_dir=party.resolve().parent)
    from safetensors.torch import load_file

    site = open_site(job, [located])
    try:
        # What does not fit is left out without a word, and the rest would be judged.
        fits = job.peft.peft_type == "LORA" and len(load_file(adapter / WEIGHTS)) == len(site.model.manifest)
        tensors = read_adapter(site.model, adapter) if fits else {}
    except (OSError, RuntimeError):
        tensors = {}
    if not tensors:
        raise ModelError(
            "PEFT_TARGET",
            "there is no LoRA adapter of the job's targets and rank",
            where=str(adapter),
            fix="name the folder with adapter_model.safetensors that the job delivered; or audit the run itself",
        )
    rows = _membership(Attack(site, [("delivered", None, tensors)]), [located], where=str(adapter))
    return Audit(adapter, None, rows, None, None, [])


def _to_the_end(job: Job) -> Job:
    """Return the job with the last round delivered: canaries spoil held-out losses, so the best may be the first.

    Nobody claims what knows canaries, so nothing is marked.
    """
    changes: dict[str, Any] = {"ownership": OwnershipSettings()}
    if "keep" in type(job.federation).model_fields:
        changes["federation"] = job.federation.model_copy(update={"keep": "last"})
    return job.model_copy(update=changes).located(job.base_dir)


def _open(job: Job, parties: list[LocatedParty], path: Path) -> Site:
    # What is spent in an audit is not released, so the sites' own ledgers have no part in it.
    purses = {located.party.name: Purse(path / PURSE_FOLDER) for located in parties}
    return replace(open_site(job, parties), purses=purses)


def _go_on(path: Path, site: Site, parties: list[LocatedParty], plan: Mapping[str, Any], watch: Watch | None) -> None:
    reads = {located.party.name: party_examples(site.job, located) for located in _training(site.job, parties)}
    data = _planted(site, parties, plan, reads)
    run = RunFolder.open(path)
    try:
        run.event("run_resumed")
        _carry_out(run, site, parties, data, plan, watch)
    finally:
        run.close()


def _carry_out(
    run: RunFolder,
    site: Site,
    parties: list[LocatedParty],
    data: Mapping[str, TokenData],
    plan: Mapping[str, Any],
    watch: Watch | None,
) -> None:
    with concluding(run):
        listener = Listener(site, run.path, data, plan["texts"])
        trainer = listener.trainer(trainer_for(site.job))
        hosts = local_hosts(site, data, run, trainer=trainer, on_step=(watch or Watch()).on_step)
        listener.listen(hosts)
        carry_out(run, site.job, parties, InProcessLink(hosts), watch=watch)


def _training(job: Job, parties: list[LocatedParty]) -> list[LocatedParty]:
    """Return the parties that train. Of the data of others nothing is in what a run delivers."""
    return [located for located in parties if located.party.name in job.trainers]


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
        tokens = party_tokens(site, located, read=reads.get(name))
        planted = sets[name].planted(plan["copies"]) if name in sets else []
        data[name] = replace(tokens, train=[*tokens.train, *planted])
    return data


def _canary_sets(site: Site, plan: Mapping[str, Any]) -> dict[str, CanarySet]:
    maker = CanaryMaker(site.base.tokenizer, data_settings(site.job), seed=site.job.seed)
    decoys = max(100, _DECOYS // len(plan["parties"]))
    return {
        party: maker.make(party, entry["kind"], number=entry["canaries"], decoys=decoys)
        for party, entry in plan["parties"].items()
    }


def _audit(path: Path, site: Site, parties: list[LocatedParty], plan: Mapping[str, Any] | None) -> Audit:
    attack = Attack(site, final_models(path, site))
    rows = _membership(attack, _training(site.job, parties), where=str(path), needed=plan is None)
    claim = claimed(site.job, path)
    found = attack.canaries(_canary_sets(site, plan), plan["copies"], claim) if plan else None
    passes = None
    if claim and found:
        passes = found["epsilon_lower_bound"] > found["claimed_epsilon"]
    audit = Audit(path, claim, rows, found, passes, update_rows(path))
    write_json(path / _FOUND, audit.values())
    renew(path, [_FOUND])
    return audit


def _membership(
    attack: Attack, parties: list[LocatedParty], *, where: str, needed: bool = True
) -> list[dict[str, Any]]:
    rows = [row for located in parties if (row := attack.membership(located))]
    if needed and not rows:
        raise ConfigError(
            "DATA_EMPTY",
            "no party on this machine holds examples out, so there is nothing to compare its training examples with",
            where=where,
            fix="set `data.eval` or `data.eval_share` in party.yaml, or audit the job: `fedllm audit job.yaml`",
        )
    return rows
