"""The paper's experiment for any job: base model, each party alone, federated, all data pooled; one test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from fedllm.data.formats import Example
from fedllm.data.read import read_party_data
from fedllm.errors import ConfigError
from fedllm.job.check import check_job
from fedllm.job.job import Job, LocatedParty, load_parties
from fedllm.ownership.settings import OwnershipSettings
from fedllm.privacy.settings import PrivacySettings
from fedllm.runs.digests import DIGESTS
from fedllm.runs.folder import RunFolder, run_identity
from fedllm.runs.jsonl import write_json
from fedllm.runs.plan_files import write_plan
from fedllm.runtime.delivery import need_adapter
from fedllm.runtime.judge import TestSet, final_models, final_tensors, judge, test_set
from fedllm.runtime.local import InProcessLink, local_hosts
from fedllm.runtime.run import RunResult, Watch, carry_out, concluding, read_result, write_pages
from fedllm.runtime.site import Site, common_examples, open_site, party_tokens
from fedllm.scenarios.base import TokenData

Scores = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The table, one row per model, and one sentence about it."""

    rows: list[Scores]
    sentence: str
    recovered: float | None
    result: RunResult


def compare(
    job: Job, *, parties: list[LocatedParty] | None = None, output: Path | None = None, watch: Watch | None = None
) -> Comparison:
    """Run a job and its yardsticks, judge them on one test set, and return the table.

    A single party trains for as many rounds as the federation, with the same steps and without server momentum;
    the pooled model sees as many examples as all parties together. The test set is `evaluate.test`, or else the
    parties' held-out examples together. What has run already is not run again.

    Args:
        job: The job.
        parties: Its party files.
        output: The run folder of the federation; the yardsticks go into `baselines/` in it.
        watch: Callbacks for a live view.

    Raises:
        FedllmError: See its code.
    """
    parties = parties if parties is not None else load_parties(job)
    check_job(job, parties)
    path = output or Path("runs") / f"{job.name}-{job.digest[:8]}"
    need_adapter(path, job)
    watch = watch or Watch()
    site = open_site(job, parties)
    data = {located.party.name: party_tokens(site, located) for located in parties}
    test = test_set(site, _test_examples(job, parties))
    bench = _Bench(site, parties, path, watch)
    result = bench.train(job, data, path)
    watch.on_stage("base model", 0)
    rows = [_row("base model", "base", None, judge(site, test, None))]
    for party in job.trainers:
        tensors = bench.yardstick(alone(job, party), {party: data[party]})
        rows.append(_row(f"{party} alone", "alone", party, judge(site, test, tensors)))
    for name, owner, tensors in final_models(path, site):
        rows.append(_row(name, "federated", owner, judge(site, test, tensors)))
    pooled_tensors = bench.yardstick(pooled(job), {"pooled": _together({name: data[name] for name in job.trainers})})
    rows.append(_row("pooled", "pooled", None, judge(site, test, pooled_tensors)))
    return _written(rows, test, result)


@dataclass(frozen=True)
class _Bench:
    site: Site
    parties: list[LocatedParty]
    path: Path
    watch: Watch

    def yardstick(self, job: Job, data: dict[str, TokenData]) -> dict[str, Any]:
        folder = self.path / "baselines" / job.name
        self.train(job, data, folder)
        return final_tensors(folder, job)

    def train(self, job: Job, data: dict[str, TokenData], folder: Path) -> RunResult:
        run = _open_or_create(folder, job)
        try:
            if (found := read_result(folder)) and found.is_finished:
                return found
            if not (folder / "job.yaml").exists():
                write_plan(run, job, self.parties)
            with concluding(run):
                hosts = local_hosts(replace(self.site, job=job), data, run, on_step=self.watch.on_step)
                return carry_out(run, job, self.parties, InProcessLink(hosts), watch=self.watch)
        finally:
            run.close()


def _open_or_create(folder: Path, job: Job) -> RunFolder:
    if not (folder / "run.json").exists():
        return RunFolder.create(folder, job_digest=job.digest)
    if run_identity(folder)["job_digest"] != job.digest:
        raise ConfigError(
            "RUN_EXISTS",
            "the folder holds a run of another job",
            where=str(folder),
            fix="name another folder with `--output`",
        )
    return RunFolder.open(folder)


def alone(job: Job, party: str) -> Job:
    """Return the yardstick job of one party.

    Args:
        job: The federation's job.
        party: The party.
    """
    federation = job.table_line().alone(job.federation)
    train = job.train.model_copy(update={"optimizer_state": "keep"})
    # The test set is for the end: a yardstick's rounds are judged by its own held-out data, as the federation's are.
    evaluate = job.evaluate.model_copy(update={"test": None, "max_examples": None})
    changes = {"name": f"{party}-alone", "parties": [party], "federation": federation}
    # What noise and marks cost is a part of the comparison, and a yardstick leaves nobody's hands.
    changes |= {"train": train, "evaluate": evaluate, "privacy": PrivacySettings(), "ownership": OwnershipSettings()}
    return job.model_copy(update=changes).located(job.base_dir)


def pooled(job: Job) -> Job:
    """Return the yardstick job of all data in one place: as many steps as all parties do together.

    Args:
        job: The federation's job.
    """
    single = alone(job, "pooled")
    steps = job.train.local_steps
    train = single.train.model_copy(update={"local_steps": steps and steps * len(job.trainers)})
    return single.model_copy(update={"name": "pooled", "train": train}).located(job.base_dir)


def _together(data: dict[str, TokenData]) -> TokenData:
    parts = list(data.values())
    return TokenData(
        [example for part in parts for example in part.train],
        [example for part in parts for example in part.held_out],
        parts[0].common,
    )


def _test_examples(job: Job, parties: list[LocatedParty]) -> Sequence[Example]:
    if job.evaluate.test is not None:
        return common_examples(job)
    found: list[Example] = []
    for located in parties:
        read = read_party_data(
            located.party.data,
            base_dir=located.base_dir,
            settings=job.data,
            seed=job.seed,
            party=located.party.name,
        )
        found += read.held_out
    if not found:
        raise ConfigError(
            "DATA_EMPTY",
            "there is nothing to compare on: the job names no test set and no party holds examples out",
            where="evaluate.test",
            fix="set `evaluate.test`, or `data.eval_share` in the party files",
        )
    return found


def _row(model: str, kind: str, party: str | None, scores: Scores) -> Scores:
    return {"model": model, "kind": kind, "party": party, **scores}


def _written(rows: list[Scores], test: TestSet, result: RunResult) -> Comparison:
    recovered, sentence = verdict(rows)
    first = rows[0]
    comparison = {
        "rows": rows,
        "sentence": sentence,
        "recovered": recovered,
        "test_examples": len(test.examples),
        "bleu_signature": first.get("bleu_signature", ""),
        "rouge_tokenizer": first.get("rouge_tokenizer", ""),
    }
    write_json(result.path / "comparison.json", comparison)
    baselines = (f"baselines/{path.parent.name}/{DIGESTS}" for path in result.path.glob(f"baselines/*/{DIGESTS}"))
    write_pages(result.path, "comparison.json", *sorted(baselines))
    return Comparison(rows, sentence, recovered, result)


# The first that every row has is what models are judged by.
_JUDGED_BY = (("rougeL", "ROUGE-L"), ("accuracy", "accuracy"), ("loss_nats", "loss"))


def verdict(rows: list[Scores]) -> tuple[float | None, str]:
    """Return the share of the gap that federation closes, and a sentence that says so.

    The gap lies between the mean single party and pooled data, by ROUGE-L, accuracy, or else loss. Where each
    party has a federated model of its own, their mean counts.

    Args:
        rows: The table.
    """
    metric, name = next(found for found in _JUDGED_BY if all(found[0] in row for row in rows))
    higher = metric != "loss_nats"
    single = [row[metric] for row in rows if row["kind"] == "alone"]
    mean = sum(single) / len(single)
    # Where each party has a model of its own there are several federated ones.
    federated, together = (
        fmean(row[metric] for row in rows if row["kind"] == kind) for kind in ("federated", "pooled")
    )
    best = max(single) if higher else min(single)
    beats = federated > best if higher else federated < best
    against = f"{'above' if beats else 'not above'} the best single party ({best:.2f})"
    gap = together - mean if higher else mean - together
    if gap <= 0:
        return None, (
            f"Federated {name} is {federated:.2f}, {against}; pooled data ({together:.2f}) are no better here than the "
            f"mean single party ({mean:.2f}), so there is no gap to close."
        )
    share = (federated - mean if higher else mean - federated) / gap
    return share, (
        f"Federated tuning reaches {name} {federated:.2f}, {against}, and closes {share:.0%} of the gap between the "
        f"mean single party ({mean:.2f}) and pooled data ({together:.2f})."
    )
