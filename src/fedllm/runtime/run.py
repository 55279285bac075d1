"""Run, resume and finish a job on this machine. What the command line does, Python can do with these functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedllm.disk import write_atomic
from fedllm.errors import ConfigError, FedllmError, ResourceError, RunPaused
from fedllm.job.check import check_job
from fedllm.job.job import Job, LocatedParty, load_parties
from fedllm.job.ownership import check_committed
from fedllm.models.digest import file_digest
from fedllm.runs.card import model_card
from fedllm.runs.digests import DIGESTS, renew, seal_run
from fedllm.runs.folder import CANARIES, RunFolder, check_free, run_identity
from fedllm.runs.jsonl import Row, read_rows, write_json
from fedllm.runs.metrics import run_rows
from fedllm.runs.plan_files import read_plan, write_plan, write_provenance
from fedllm.runs.report import write_report
from fedllm.runtime.base import Link, Ready
from fedllm.runtime.bytes_after import counted_after
from fedllm.runtime.copies import hand_out
from fedllm.runtime.courier import config_folder, courier_of
from fedllm.runtime.delivery import own_adapters, write_adapter
from fedllm.runtime.driver import Driver, Outcome
from fedllm.runtime.federation import LinkedFederation
from fedllm.runtime.guard import Auditor
from fedllm.runtime.local import InProcessLink, local_hosts
from fedllm.runtime.noise import server_budget
from fedllm.runtime.notary import notary_of
from fedllm.runtime.party_data import party_facts
from fedllm.runtime.site import Site, base_folder, need_packages, open_site, party_tokens
from fedllm.runtime.sum_keys import make_sum_keys, terms_of
from fedllm.runtime.validate import upload_limits, validate
from fedllm.scenarios.base import ServerHalf, TokenData
from fedllm.train.base import LocalTrainer
from fedllm.wire.payload import Tensors

_EACH_ITS_OWN = (
    " There is no adapter for all: each party has its own, in parties/NAME/adapter of the run folder at its site."
)


@dataclass(frozen=True)
class Watch:
    """Callbacks for a live view.

    `on_stage(name, num_rounds)`, `on_round(number, rows)`, `on_party("asked" or "answered", party, round)`, and
    `on_step(party, step, num_steps)` where its steps are known here, `on_state(party, words)` with what a party does,
    and again and again `on_wait(why, who)`: why nothing can be done yet, and who is waited for.
    """

    on_round: Callable[[int, list[Row]], None] = lambda number, rows: None
    on_party: Callable[[str, str, int], None] = lambda event, party, round_: None
    on_step: Callable[[str, int, int], None] = lambda party, step, num_steps: None
    on_stage: Callable[[str, int], None] = lambda stage, num_rounds: None
    on_wait: Callable[[str, str], None] = lambda why, who: None
    on_state: Callable[[str, str], None] = lambda party, words: None


@dataclass(frozen=True)
class RunResult:
    """A run as it stands on disk."""

    path: Path
    status: str
    rounds: int
    best_round: int | None
    adapter_sha256: str | None

    @property
    def adapter(self) -> Path:
        """The folder of the tuned adapter, in PEFT's layout; absent where each party has its own."""
        return self.path / "adapter"

    @property
    def is_finished(self) -> bool:
        """Whether all rounds are done and what they lead to is delivered."""
        return self.status in ("SUCCESS", "PARTIAL")

    def rows(self) -> list[Row]:
        """Return the metrics, a dict per value: round, party, split, name, value."""
        return run_rows(self.path)


def run_local(
    job: Job,
    *,
    parties: list[LocatedParty] | None = None,
    output: Path | None = None,
    trainer: LocalTrainer | None = None,
    num_workers: int = 0,
    watch: Watch | None = None,
) -> RunResult:
    """Run a job with all its parties on this machine and return the result.

    Args:
        job: The job.
        parties: Its party files; by default `parties/NAME.yaml` beside the job file.
        output: The run folder; by default `runs/NAME-DIGEST`.
        trainer: Another local trainer than the supervised one, such as `fedllm.HFTrainer(MyTrainer)`.
        num_workers: Worker processes that share out the parties; 0 runs all in this process.
        watch: Callbacks for a live view.

    Raises:
        FedllmError: See its code; `RunPaused` can be resumed with `resume`.
    """
    parties = parties if parties is not None else load_parties(job)
    check_job(job, parties)
    check_committed(job, parties)
    path = output or Path("runs") / f"{job.name}-{job.digest[:8]}"
    # What is wrong with the model or the data is found before there is a run folder.
    check_free(path)
    loaded = _load(job, parties, trainer=trainer, num_workers=num_workers)
    run = RunFolder.create(path, job_digest=job.digest)
    try:
        write_plan(run, job, parties)
        with concluding(run):
            return _run(run, job, parties, loaded, num_workers=num_workers, watch=watch)
    finally:
        run.close()


def resume(
    path: Path, *, trainer: LocalTrainer | None = None, num_workers: int = 0, watch: Watch | None = None
) -> RunResult:
    """Go on with a run from its last committed round and return the result.

    Args:
        path: The run folder.
        trainer: The trainer that the run was started with, if it was not the default.
        num_workers: Worker processes; another number than before gives the same bits.
        watch: Callbacks for a live view.

    Raises:
        FedllmError: See its code; `STATE_CORRUPT` when no checkpoint can be read, `BAD_COMBINATION` for a run that
            `audit_job` began, which `audit_run` goes on with.
    """
    job, parties = read_plan(path)
    if (path / CANARIES).exists():
        raise ConfigError(
            "BAD_COMBINATION",
            "the run is an audit's: canaries are among its data",
            where=str(path),
            fix=f"`fedllm audit {path}` goes on with it",
        )
    run = RunFolder.open(path)
    try:
        if (finished := read_result(path)) and finished.is_finished:
            # The crash may have come between the verdict and the pages about it.
            write_pages(path)
            return finished
        run.event("run_resumed")
        with concluding(run):
            loaded = _load(job, parties, trainer=trainer, num_workers=num_workers)
            return _run(run, job, parties, loaded, num_workers=num_workers, watch=watch)
    finally:
        run.close()


@dataclass(frozen=True)
class _Loaded:
    site: Site
    data: dict[str, TokenData]
    trainer: LocalTrainer | None


def _load(job: Job, parties: list[LocatedParty], *, trainer: LocalTrainer | None, num_workers: int) -> _Loaded | None:
    if not num_workers:
        site = open_site(job, parties)
        if refused := upload_limits(job, parties, site.model):
            raise refused[0]
        return _Loaded(site, {located.party.name: party_tokens(site, located) for located in parties}, trainer)
    if num_workers < 0:
        raise ConfigError("BAD_VALUE", f"num_workers is {num_workers}", where="num_workers", fix="give 0 or more")
    if trainer is not None:
        raise ConfigError(
            "BAD_COMBINATION", "a trainer of your own cannot travel to worker processes", fix="set num_workers=0"
        )
    # The workers load for themselves.
    need_packages(job, parties)
    validate(job, parties)
    return None


def _run(
    run: RunFolder,
    job: Job,
    parties: list[LocatedParty],
    loaded: _Loaded | None,
    *,
    num_workers: int,
    watch: Watch | None,
) -> RunResult:
    if loaded is None:
        from fedllm.runtime.workers import WorkerLink

        make_sum_keys(job, run)
        return carry_out(run, job, parties, WorkerLink(parties, run, num_workers=num_workers), watch=watch)
    hosts = local_hosts(loaded.site, loaded.data, run, trainer=loaded.trainer, on_step=(watch or Watch()).on_step)
    return carry_out(run, job, parties, InProcessLink(hosts), watch=watch)


def carry_out(
    run: RunFolder,
    job: Job,
    parties: list[LocatedParty],
    link: Link,
    *,
    watch: Watch | None = None,
    auditor: Auditor | None = None,
) -> RunResult:
    """Return the result of a run over any link; the link is closed.

    Args:
        run: The run folder.
        job: The job.
        parties: The parties of this machine.
        link: To the parties.
        watch: Callbacks for a live view.
        auditor: The server's audit log, where there is one.
    """
    try:
        outcome = drive(run, job, link, watch=watch, auditor=auditor)
    finally:
        link.close()
    return finish(run, job, parties, outcome)


def drive(
    run: RunFolder, job: Job, link: Link, *, watch: Watch | None = None, auditor: Auditor | None = None
) -> Outcome:
    """Return the outcome of all rounds that are left, over any link.

    Args:
        run: The run folder.
        job: The job.
        link: To the parties.
        watch: Callbacks for a live view.
        auditor: The server's audit log, where there is one.
    """
    watch = watch or Watch()
    watch.on_stage(job.name, job.federation.num_rounds)
    line = job.table_line()
    federation = LinkedFederation(
        link,
        kinds=line.kinds(),
        job_digest=run.job_digest,
        run_id=run.run_id,
        timeout_s=job.federation.round_timeout,
        notify=watch.on_party,
    )
    federation.sums = terms_of(job)
    if link.seal:
        federation.start_at(run.next_epoch())
    server: ServerHalf = line.server(
        job.federation,
        seed=job.seed,
        common=job.evaluate.test is not None,
        privacy=job.privacy,
        budget=server_budget(job, run),
    )

    def on_ready(ready: Ready) -> None:
        compared = ("base_digest", "tokenizer_digest", "template_digest", "common_digest")
        digests = {name: getattr(ready, name) for name in compared}
        write_provenance(run, job, **digests)
        write_json(run.path / "parties.json", [party_facts(run, party) for party in link.parties])

    asides = (auditor, notary_of(job, run), courier_of(job, run))
    driver = Driver(run, federation, server, job.federation.num_rounds, watch.on_round, on_ready, *asides)
    outcome = driver.drive()
    if job.ownership.trace != "none":
        with counted_after(run, federation, job.federation.num_rounds):
            hand_out(run, job, federation, server.final(outcome.state)[0])
    return outcome


@contextmanager
def concluding(run: RunFolder) -> Iterator[None]:
    """Write the verdict when a run stops before its end, and let the error pass.

    Args:
        run: The run folder.
    """
    try:
        yield
    except FedllmError as error:
        error.fix = error.fix.replace("fedllm resume RUN", f"fedllm resume {run.path}")
        paused = isinstance(error, RunPaused | ResourceError)
        reason = f"{error.where}: {error.what}" if error.where else error.what
        status = "PAUSED" if paused else "FAILED"
        conclude(run, status, f"{reason} [{error.code}]", code=error.code, where=error.where)
        raise
    except Exception as error:
        conclude(run, "FAILED", f"An unexpected {type(error).__name__}: a fault of fedllm.", code="UNEXPECTED")
        raise
    except BaseException as stop:
        # KeyboardInterrupt, and what the command line raises for a signal.
        conclude(run, "PAUSED", "It was interrupted.", code="INTERRUPTED")
        stop.add_note(f"paused; go on with: fedllm resume {run.path}")
        raise


def conclude(run: RunFolder, status: str, reason: str, *, code: str, where: str = "") -> None:
    """Write a verdict and the report that goes with it.

    Args:
        run: The run folder.
        status: `PAUSED` or `FAILED`.
        reason: One sentence.
        code: A stable code.
        where: The party or the file where it happened, as in the error.
    """
    event = {"PAUSED": "run_paused", "FAILED": "run_failed"}[status]
    # A full disk may be why the run stops: the error that says so must get through.
    with suppress(ResourceError):
        run.event(event, code=code, detail=reason)
        result = RunResult(run.path, status, run.last_commit() or 0, None, None)
        facts = {"code": code, "where": where, "reason": reason, "next": f"fedllm resume {run.path}"}
        _write_result(run, result, facts)
        write_report(run.path)


def _write_result(run: RunFolder, result: RunResult, facts: Mapping[str, str | None]) -> None:
    found = {"status": result.status, **facts, "rounds": result.rounds}
    found |= {"best_round": result.best_round, "adapter_sha256": result.adapter_sha256}
    write_json(run.path / "result.json", found)


def finish(run: RunFolder, job: Job, parties: list[LocatedParty], outcome: Outcome) -> RunResult:
    """Write the adapter, its card, the verdict and the report, and return the result.

    Args:
        run: The run folder.
        job: The job.
        parties: The parties of this machine.
        outcome: From `drive`.
    """
    server: ServerHalf = job.table_line().server(job.federation, seed=job.seed, common=False)
    tensors, best = server.final(outcome.state)
    sha256 = _deliver(run, job, parties, tensors) if tensors else None
    failed = sorted({row["party"] for row in read_rows(run.path / "events.jsonl") if row["event"] == "party_failed"})
    status = "PARTIAL" if failed else "SUCCESS"
    reason = f"All {outcome.state.round} rounds were committed"
    reason += f"; {', '.join(failed)} missed at least one." if failed else " with every party asked."
    told = job.table_line().delivered(job.federation)
    reason += f" {told}" if told else "" if tensors else _EACH_ITS_OWN
    run.event("run_finished", detail=status)
    result = RunResult(run.path, status, outcome.state.round, best, sha256)
    # Where each party has its own adapter, it is judged where that is.
    verb = "eval" if tensors or own_adapters(run.path, job) else "report"
    facts = {"code": None, "where": "", "reason": reason, "next": f"fedllm {verb} {run.path}"}
    _write_result(run, result, facts)
    write_pages(run.path)
    return result


def write_pages(path: Path, *also: str) -> None:
    """Write the adapter's model card, where the run has one adapter for all, the report, and the digests of all files.

    Where there are digests, they are renewed for the pages alone: what else was changed since is still found.

    Args:
        path: The run folder.
        also: Other files that were written just now.
    """
    if (path / "adapter").is_dir():
        write_atomic(path / "adapter" / "README.md", model_card(path).encode())
    write_report(path)
    if (path / DIGESTS).exists():
        renew(path, ["adapter/README.md", *also])
    else:
        seal_run(path)


def _deliver(run: RunFolder, job: Job, parties: list[LocatedParty], tensors: Tensors) -> str:
    # A coordinator has no party on its machine; of the base model it needs the config alone.
    base = base_folder(job, parties)[0] if parties else config_folder(run, job)
    return file_digest(write_adapter(tensors, run.path / "adapter", job=job, base=base))


def read_result(path: Path) -> RunResult | None:
    """Return the result of a run as it stands on disk, or None before there is one.

    Args:
        path: The run folder.
    """
    run_identity(path)
    try:
        found = json.loads((path / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return RunResult(path, found["status"], found["rounds"], found["best_round"], found["adapter_sha256"])
