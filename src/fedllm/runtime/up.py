"""`fedllm up`: the whole project on one machine, with real processes and mutual TLS, as between machines."""

from __future__ import annotations

import io
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ruamel.yaml import YAML

from fedllm.errors import ResourceError, RunFailed, RunPaused
from fedllm.identity.files import KEY_FILE, CoordinatorFolder
from fedllm.identity.keys import load_key
from fedllm.identity.signing import Signer
from fedllm.job.approval import approve
from fedllm.job.check import check_job
from fedllm.job.job import Job, LocatedParty, load_parties
from fedllm.job.project import Project, ServerAddress
from fedllm.runs.control import read_object, verdict, want
from fedllm.runs.jsonl import read_rows, write_atomic
from fedllm.runtime.coordinator import go_on, status, submit
from fedllm.runtime.provision import provision_all
from fedllm.runtime.run import RunResult, Watch, read_result
from fedllm.runtime.supervise import Supervised
from fedllm.runtime.validate import validate

_LOOK_S = 0.2
_STOP_S = 30.0
_FINAL = {"SUCCESS", "PARTIAL", "FAILED"}


def up(job: Job, *, folder: Path | None = None, watch: Watch | None = None) -> RunResult:
    """Run a job with real processes for the server and each party on this machine, and return the result.

    Args:
        job: The job; its party files are in `parties/` beside it.
        folder: Where keys, kits and states go; by default `up/NAME-DIGEST`. What is there is gone on with.
        watch: Callbacks for a live view.

    Raises:
        FedllmError: See its code; a paused run goes on with the same call.
    """
    parties = load_parties(job)
    check_job(job, parties)
    validate(job, parties)
    root = (folder or Path("up") / f"{job.name}-{job.digest[:8]}").resolve()
    project_file = _prepared(root, job, parties)
    run = _run_of(project_file, job) or submit(job, project_file, parties=parties)
    if (finished := read_result(run)) and finished.adapter_sha256:
        return finished
    go_on(run)
    with _processes(root, project_file, job.base_dir / "parties", parties):
        try:
            _follow(run, job, watch or Watch())
        except BaseException:
            _pause(run)
            raise
    result = read_result(run)
    assert result is not None  # noqa: S101
    return _or_raise(run, result)


def _run_of(project_file: Path, job: Job) -> Path | None:
    runs = CoordinatorFolder.beside(project_file).site / "state" / "runs"
    path = runs / f"{job.name}-{job.digest[:8]}"
    return path if (path / "control.json").is_file() else None


def _prepared(root: Path, job: Job, parties: list[LocatedParty]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    project_file = root / "project.yaml"
    if not project_file.exists():
        address = ServerAddress(host="127.0.0.1", port=_free_port())
        project = Project(name="loopback", server=address, parties=list(job.parties))
        _write_yaml(project_file, project.model_dump(mode="json"))
    project = Project.from_yaml(project_file)
    sites = {located.party.name: _site(root, located) for located in parties}
    provision_all(root / "coordinator", project, sites)
    for located in parties:
        site = sites[located.party.name]
        signer = Signer(load_key(site / KEY_FILE))
        approve(job, located.party, signer=signer, folder=site, project=project.name)
    return project_file


def _site(root: Path, located: LocatedParty) -> Path:
    return root / f"site-{located.party.name}"


def _write_yaml(path: Path, value: object) -> None:
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(value, text)
    write_atomic(path, text.getvalue().encode())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _processes(root: Path, project_file: Path, folder: Path, parties: list[LocatedParty]) -> Iterator[None]:
    me = [sys.executable, "-m", "fedllm"]
    kept = [Supervised([*me, "serve", str(project_file)], root / "server.log")]
    for located in parties:
        name = located.party.name
        command = [*me, "join", str(folder / f"{name}.yaml"), "--site", str(_site(root, located))]
        kept.append(Supervised(command, root / f"{name}.log"))
    try:
        for process in kept:
            process.keep()
        yield
    finally:
        for process in kept:
            process.ask_to_stop()
        for process in kept:
            process.stop()


def _follow(run: Path, job: Job, watch: Watch) -> None:
    watch.on_stage(job.name, job.federation.num_rounds)
    shown, said = -1, ""
    while True:
        shown = _show_rounds(run, shown, watch)
        for party, seen in read_object(run / "live.json").get("parties", {}).items():
            if seen["num_steps"]:
                watch.on_step(party, seen["step"], seen["num_steps"])
        found = verdict(run)
        now = status(run)
        if found.get("status") in _FINAL or now.state in ("PAUSED", "STOPPED"):
            _show_rounds(run, shown, watch)
            return
        if (line := f"{now.state.lower()}: {now.why}") != said and now.state in ("WAITING", "STARTING"):
            said = line
            watch.on_wait(line)
        time.sleep(_LOOK_S)


def _show_rounds(run: Path, shown: int, watch: Watch) -> int:
    rows = read_rows(run / "metrics.jsonl")
    last = max((int(row["round"]) for row in rows), default=-1)
    committed = read_rows(run / "journal.jsonl")
    last = min(last, max((int(row["round"]) for row in committed if row["step"] == "commit"), default=-1))
    for number in range(shown + 1, last + 1):
        watch.on_round(number, [row for row in rows if row["round"] == number])
    return max(shown, last)


def _pause(run: Path) -> None:
    # The server's process ends in order, at the last committed round.
    want(run, "pause")
    until = time.monotonic() + _STOP_S
    while status(run).state == "RUNNING" and time.monotonic() < until:
        time.sleep(_LOOK_S)


def _or_raise(run: Path, result: RunResult) -> RunResult:
    if result.status in ("SUCCESS", "PARTIAL"):
        return result
    found = verdict(run)
    error: type[RunPaused] | type[RunFailed] = RunPaused if result.status == "PAUSED" else RunFailed
    if found.get("code") == "DISK_FULL":
        raise ResourceError("DISK_FULL", found["reason"], where=str(run), fix="free some space, then run it again")
    raise error(
        found.get("code") or "PARTY_FAILED", found["reason"], where=str(run), fix="see the logs; then run it again"
    )
