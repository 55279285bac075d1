"""Runs between machines, as the coordinator keeps them: submit one, pause it, let it go on, stop it for good."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedllm.errors import ConfigError, nearest
from fedllm.identity.files import CoordinatorFolder
from fedllm.job.project import Project
from fedllm.runs.control import CONTROL, SUPERVISOR_LOCK, is_held, is_worked_on, read_object, verdict, want, wanted
from fedllm.runs.folder import RunFolder, run_identity
from fedllm.runtime.status import STALE_S, age_s, modified

if TYPE_CHECKING:
    from fedllm.job.job import Job, LocatedParty


def submit(job: Job, project_file: Path, *, parties: list[LocatedParty] | None = None) -> Path:
    """Return the folder of a new run at the coordinator; the server begins it once all parties are connected.

    The run of a job that was stopped stays as it is; the job gets another run.

    Args:
        job: The job.
        project_file: The project's file; the coordinator's folder is beside it.
        parties: Party files of this machine, where some are here.

    Raises:
        ConfigError: The job names parties that are not in the project, or a run of it exists.
        ModelError: The base model's config is not here; the weights need not be.
    """
    # Who only looks at runs does without torch.
    from fedllm.models.load import find_base
    from fedllm.runs.plan_files import write_plan

    project = Project.from_yaml(project_file)
    for party in job.parties:
        if party not in project.parties:
            what = f"the job names `{party}`, which is no party of the project {project.name}"
            fix = f"{nearest(party, project.parties)} A new party goes into {project_file}, and is provisioned"
            raise ConfigError("PARTY_UNKNOWN", what, where=job.origins.get("parties", "parties"), fix=fix)
    if job.sender is None:
        # Else its owner tells the config.
        find_base(job.model, base_dir=job.base_dir)
    path = _place(job, project_file)
    if not (path / "local.json").exists():
        run = RunFolder.create(path, job_digest=job.digest)
        try:
            write_plan(run, job, parties or [])
        finally:
            run.close()
    want(path, "run")
    return path


def _place(job: Job, project_file: Path) -> Path:
    for path in _places(job, project_file):
        if wanted(path) is None:
            return path
        if wanted(path) == "stop":
            continue
        if verdict(path).get("status") in ("SUCCESS", "PARTIAL"):
            fix = f"`fedllm eval {path}`; with another `seed` or `name` it is another job"
            raise ConfigError("RUN_EXISTS", "the job ran already to its end", where=str(path), fix=fix)
        fix = f"`fedllm status {path}` says how far it is"
        raise ConfigError("RUN_EXISTS", "the job was submitted already", where=str(path), fix=fix)
    raise AssertionError


def _places(job: Job, project_file: Path) -> Iterator[Path]:
    first = _runs(project_file) / f"{job.name}-{job.digest[:8]}"
    yield first
    for number in count(2):
        yield first.with_name(f"{first.name}-{number}")


def run_of(job: Job, project_file: Path) -> Path | None:
    """Return the run of a job that was submitted and not stopped, or None.

    Args:
        job: The job.
        project_file: The project's file.
    """
    for path in _places(job, project_file):
        if wanted(path) != "stop":
            return path if wanted(path) is not None else None
    raise AssertionError


def _runs(project_file: Path) -> Path:
    return CoordinatorFolder.beside(project_file).site / "state" / "runs"


def runs_of(project_file: Path) -> list[Path]:
    """Return the runs at a coordinator, oldest first.

    Args:
        project_file: The project's file.
    """
    paths = (path.parent for path in _runs(project_file).glob(f"*/{CONTROL}"))
    return sorted(paths, key=lambda path: (path / "run.json").stat().st_mtime)


@dataclass(frozen=True)
class ServerStatus:
    """The server of a project at this moment."""

    state: Literal["RUNNING", "STARTING", "DOWN"]
    since: str
    connected: tuple[str, ...]
    missing: tuple[str, ...]
    next: str

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON value."""
        return asdict(self)


def server_status(project_file: Path) -> ServerStatus:
    """Return whether a project's server runs, since when, and which parties are connected to it.

    Args:
        project_file: The project's file.

    Raises:
        ConfigError: The file is wrong.
    """
    project = Project.from_yaml(project_file)
    state = _runs(project_file).parent
    clerk, lock = read_object(state / "clerk.json"), state / SUPERVISOR_LOCK
    last = str(clerk.get("time", ""))
    if not is_held(lock):
        return ServerStatus("DOWN", last, (), tuple(project.parties), f"fedllm serve {project_file}")
    if age_s(last) > STALE_S:
        return ServerStatus("STARTING", modified(lock), (), tuple(project.parties), f"fedllm status {project_file}")
    connected = tuple(str(name) for name in clerk.get("connected", ()))
    missing = tuple(party for party in project.parties if party not in connected)
    next_ = f"at {', '.join(missing)}: fedllm join party.yaml" if missing else "fedllm submit job.yaml"
    return ServerStatus("RUNNING", modified(lock), connected, missing, next_)


def go_on(run: Path) -> None:
    """Let a run go on that was paused, or that failed for a reason that is mended.

    Args:
        run: The run folder.

    Raises:
        ConfigError: `RUN_NOT_FOUND`, or `RUN_STOPPED`.
    """
    _check_kept(run)
    if verdict(run).get("status") in ("PAUSED", "FAILED") and not is_worked_on(run):
        (run / "result.json").unlink(missing_ok=True)
    want(run, "run")


def ask(run: Path, asked: Literal["pause", "stop"]) -> None:
    """Ask for a run to be paused, or stopped for good. A run that is over stays as it is.

    Args:
        run: The run folder.
        asked: What is asked.

    Raises:
        ConfigError: `RUN_NOT_FOUND`, or `RUN_STOPPED`.
    """
    _check_kept(run)
    if verdict(run).get("status") not in ("SUCCESS", "PARTIAL"):
        want(run, asked)


def _check_kept(run: Path) -> None:
    run_identity(run)
    if wanted(run) is None:
        fix = "a run of one machine is paused with Ctrl-C, and `fedllm resume RUN` goes on with it"
        raise ConfigError("RUN_NOT_FOUND", "no run between machines is in this folder", where=str(run), fix=fix)
    if wanted(run) == "stop":
        fix = "`fedllm submit job.yaml` begins a new run of the same job; what is committed stays in this folder"
        raise ConfigError("RUN_STOPPED", "the run was stopped for good", where=str(run), fix=fix)
