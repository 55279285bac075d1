"""Runs between machines, as the coordinator sees them: submit one, look at it, pause it, go on, stop it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedllm.errors import ConfigError
from fedllm.identity.files import CoordinatorFolder
from fedllm.job.job import Job
from fedllm.job.project import Project
from fedllm.models.load import find_base
from fedllm.runs.control import is_worked_on, read_object, verdict, want, wanted
from fedllm.runs.folder import RunFolder, last_commit, run_identity
from fedllm.runs.plan_files import read_plan, write_plan

_STALE_S = 10.0


def submit(job: Job, project_file: Path, *, parties: list[Any] | None = None) -> Path:
    """Return the folder of a new run at the coordinator; the server begins it once all parties are connected.

    Args:
        job: The job.
        project_file: The project's file; the coordinator's folder is beside it.
        parties: Party files of this machine, where some are here.

    Raises:
        ConfigError: The job names parties that are not in the project, or a run of it exists.
        ModelError: The base model's config is not here; the weights need not be.
    """
    project = Project.from_yaml(project_file)
    for party in job.parties:
        if party not in project.parties:
            raise ConfigError(
                "PARTY_UNKNOWN",
                f"the job names `{party}`, which is no party of the project {project.name}",
                where="parties",
                fix=f"parties of the project: {', '.join(project.parties)}",
            )
    find_base(job.model, base_dir=job.base_dir)
    path = CoordinatorFolder.beside(project_file).site / "state" / "runs" / f"{job.name}-{job.digest[:8]}"
    run = RunFolder.create(path, job_digest=job.digest)
    try:
        write_plan(run, job, parties or [])
    finally:
        run.close()
    want(path, "run")
    return path


@dataclass(frozen=True)
class RunStatus:
    """A run between machines at this moment."""

    path: Path
    state: str
    round: int | None
    num_rounds: int
    waiting: tuple[str, ...]
    since: str
    why: str
    next: str

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON value."""
        fields = ("state", "round", "num_rounds", "waiting", "since", "why", "next")
        return {"run": str(self.path)} | {name: getattr(self, name) for name in fields}


def status(run: Path) -> RunStatus:
    """Return what a run is doing, who is waited for, since when and why, and the next command.

    Args:
        run: The run folder.

    Raises:
        ConfigError: `RUN_NOT_FOUND`.
    """
    run_identity(run)
    job, _ = read_plan(run)
    found, want_ = verdict(run), wanted(run)
    clerk = read_object(run.parent.parent / "clerk.json")
    kept = clerk.get("runs", {}).get(run.name, {})

    def made(state: str, why: str, next_: str, waiting: tuple[str, ...] = (), since: str = "") -> RunStatus:
        return RunStatus(run, state, last_commit(run), job.federation.num_rounds, waiting, since, why, next_)

    if is_worked_on(run):
        live = read_object(run / "live.json")
        waiting = tuple(f"{name} ({_doing(live, name)})" for name in live.get("waiting_s", {}))
        longest = max(live.get("waiting_s", {}).values(), default=0.0)
        why = "pausing" if want_ != "run" else f"waiting for answers, {longest:.0f} s so far" if waiting else ""
        return made("RUNNING", why, f"fedllm logs {run}", waiting)
    if found.get("status") in ("SUCCESS", "PARTIAL"):
        return made(found["status"], found["reason"], f"fedllm eval {run}")
    if found.get("status") == "FAILED" or want_ != "run":
        state = "FAILED" if found.get("status") == "FAILED" else "STOPPED" if want_ == "stop" else "PAUSED"
        return made(state, found.get("reason", "as it was asked to"), f"fedllm resume {run}")
    if _age(clerk.get("time")) > _STALE_S:
        return made(
            "WAITING", "the server does not run", "fedllm serve project.yaml", ("server",), clerk.get("time", "")
        )
    if missing := tuple(kept.get("waiting_for", ())):
        why = f"not connected: {', '.join(missing)}"
        return made("WAITING", why, "at each of these sites: fedllm join party.yaml", missing, kept.get("since", ""))
    if found.get("status") == "PAUSED" and not kept.get("job_id"):
        return made("PAUSED", found["reason"], f"fedllm resume {run}")
    return made(
        "STARTING", kept.get("why", "") or "the processes of the job are on their way up", f"fedllm status {run}"
    )


def _doing(live: dict[str, Any], party: str) -> str:
    seen = live.get("parties", {}).get(party, {})
    steps = f" step {seen['step']}/{seen['num_steps']}" if seen.get("num_steps") else ""
    silent = f", silent for {seen['silent_s']:.0f} s" if seen.get("silent_s", 0) > 3 else ""
    return f"{seen.get('stage', 'starting')}{steps}{silent}"


def _age(moment: str | None) -> float:
    if not moment:
        return float("inf")
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


def runs_of(project_file: Path) -> list[Path]:
    """Return the runs at a coordinator, oldest first.

    Args:
        project_file: The project's file.
    """
    runs = CoordinatorFolder.beside(project_file).site / "state" / "runs"
    return sorted((path.parent for path in runs.glob("*/control.json")), key=lambda path: path.stat().st_ctime)


def go_on(run: Path) -> None:
    """Let a paused run go on.

    Args:
        run: The run folder.

    Raises:
        ConfigError: `RUN_NOT_FOUND`.
    """
    run_identity(run)
    if verdict(run).get("status") in ("PAUSED", "FAILED") and not is_worked_on(run):
        (run / "result.json").unlink(missing_ok=True)
    want(run, "run")
