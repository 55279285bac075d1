"""`fedllm up`: the whole project on one machine, with real processes and mutual TLS, as between machines."""

from __future__ import annotations

import io
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from fedllm.disk import write_atomic
from fedllm.errors import ConfigError, ResourceError, RunFailed, RunPaused
from fedllm.identity.files import KEY_FILE, SERVER, CoordinatorFolder
from fedllm.identity.keys import load_key
from fedllm.identity.signing import Signer
from fedllm.job.approval import approve
from fedllm.job.check import check_job
from fedllm.job.job import Job, LocatedParty, load_parties
from fedllm.job.project import Project, ServerAddress
from fedllm.runs.control import SUPERVISOR_LOCK, is_held, is_worked_on, read_object, verdict, want, wanted
from fedllm.runs.jsonl import read_rows
from fedllm.runtime.coordinator import go_on, run_of, submit
from fedllm.runtime.provision import provision_all
from fedllm.runtime.run import RunResult, Watch, read_result
from fedllm.runtime.status import RunStatus, doing, run_status
from fedllm.runtime.supervise import Supervised, need_engine, only_one, stop_all
from fedllm.runtime.validate import validate

_LOOK_S = 0.3
# Pausing and ending together stay below ten seconds.
_PAUSE_S = 3.5
_STOP_S = 5.0
# What an earlier call left behind ends by itself within this time.
_LEFT_OVER_S = 15.0
_SERVER_S = 120.0
_PATIENCE = 3


def up(job: Job, *, folder: Path | None = None, watch: Watch | None = None) -> RunResult:
    """Run a job with real processes for the server and each party on this machine, and return the result.

    Args:
        job: The job; its party files are in `parties/` beside it.
        folder: Where keys, kits and states go; by default `up/NAME-DIGEST`. What is there is gone on with.
        watch: Callbacks for a live view.

    Raises:
        FedllmError: See its code; a paused run goes on with the same call. `RUN_EXISTS` while another call runs.
    """
    need_engine()
    root = (folder or Path("up") / f"{job.name}-{job.digest[:8]}").resolve()
    if root.is_dir():
        only_one(root, what="`fedllm up`").close()
    watch = watch or Watch()
    watch.on_stage(job.name, job.federation.num_rounds)
    watch.on_wait("starting: job, data and base model are checked", "")
    parties = load_parties(job)
    check_job(job, parties)
    validate(job, parties)
    with only_one(root, what="`fedllm up`"):
        return _up(job, root, parties, watch)


def _up(job: Job, root: Path, parties: list[LocatedParty], watch: Watch) -> RunResult:
    project_file = _prepared(root, job, parties)
    run = run_of(job, project_file) or submit(job, project_file, parties=parties)
    if (finished := read_result(run)) and finished.is_finished:
        return finished
    go_on(run)
    with _processes(root, project_file, job.base_dir / "parties", parties) as kept:
        try:
            _follow(run, kept, watch)
        except BaseException as stop:
            _pause(run)
            stop.add_note(f"paused at its last committed round; the run is in {run}")
            raise
    return _result_or_error(run)


def _prepared(root: Path, job: Job, parties: list[LocatedParty]) -> Path:
    project_file = root / "project.yaml"
    sites = {located.party.name: _site(root, located) for located in parties}
    coordinator = CoordinatorFolder.beside(project_file)
    for site in (coordinator.site, *sites.values()):
        _wait_until_free(site / "state")
    if not project_file.exists() or not _is_free(Project.from_yaml(project_file).server.port):
        # A port that somebody else took in the meantime costs new kits, which are made here anyway.
        address = ServerAddress(host="127.0.0.1", port=_free_port())
        project = Project(name="loopback", server=address, parties=list(job.parties))
        _write_yaml(project_file, project.model_dump(mode="json"))
    project = Project.from_yaml(project_file)
    provision_all(coordinator.root, project, sites)
    for located in parties:
        site = sites[located.party.name]
        signer = Signer(load_key(site / KEY_FILE))
        approve(job, located.party, signer=signer, folder=site, project=project.name)
    return project_file


def _wait_until_free(state: Path) -> None:
    until = time.monotonic() + _LEFT_OVER_S
    while is_held(state / SUPERVISOR_LOCK):
        if time.monotonic() > until:
            what = "a process of an earlier call still runs here"
            fix = f"`fuser {state / SUPERVISOR_LOCK}` names it; end it, then run the same command again"
            raise ConfigError("RUN_EXISTS", what, where=str(state), fix=fix)
        time.sleep(_LOOK_S)


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


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Connections that ended a moment ago do not keep a server from listening.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextmanager
def _processes(
    root: Path, project_file: Path, folder: Path, parties: list[LocatedParty]
) -> Iterator[dict[str, Supervised]]:
    me = [sys.executable, "-m", "fedllm"]
    kept = {SERVER: Supervised([*me, "serve", str(project_file)], root / "server.log")}
    for located in parties:
        name = located.party.name
        command = [*me, "join", str(folder / f"{name}.yaml"), "--site", str(_site(root, located))]
        kept[name] = Supervised(command, root / f"{name}.log")
    try:
        yield kept
    finally:
        stop_all(kept.values(), within_s=_STOP_S)


def _follow(run: Path, kept: dict[str, Supervised], watch: Watch) -> None:
    view, server_seen = _View(run, watch), time.monotonic()
    while True:
        for name, process in kept.items():
            if process.has_ended():
                watch.on_wait(f"the process of {name} ended with {process.last_exit}; it is started again", "")
            _check(name, process)
            process.keep()
        now = run_status(run)
        view.show(now)
        if not now.goes_on:
            return
        if now.state not in ("WAITING", "STARTING") or [who.who for who in now.waiting] != [SERVER]:
            server_seen = time.monotonic()
        _check_server(now, kept[SERVER], time.monotonic() - server_seen)
        time.sleep(_LOOK_S)


@dataclass
class _View:
    """Tells a live view what has changed since the last look."""

    run: Path
    watch: Watch
    shown: int = -1
    asked: frozenset[str] = frozenset()

    def show(self, now: RunStatus) -> None:
        self._rounds(now)
        if now.state != "RUNNING":
            self.watch.on_wait(f"{now.state.lower()}: {now.why}", "")
            return
        self.watch.on_wait("", ", ".join(f"{who.who} ({who.why})" for who in now.waiting) or now.why)
        self._parties(now)

    def _rounds(self, now: RunStatus) -> None:
        if now.round is None or now.round <= self.shown:
            return
        rows = read_rows(self.run / "metrics.jsonl")
        for number in range(self.shown + 1, now.round + 1):
            self.watch.on_round(number, [row for row in rows if row["round"] == number])
        self.shown = now.round

    def _parties(self, now: RunStatus) -> None:
        told = read_object(self.run / "live.json").get("parties", {})
        asked = frozenset(who.who for who in now.waiting if who.who in told)
        for party in sorted(asked ^ self.asked):
            self.watch.on_party("asked" if party in asked else "answered", party, self.shown + 1)
        self.asked = asked
        for party in told:
            if party in asked:
                if told[party].get("num_steps"):
                    self.watch.on_step(party, told[party]["step"], told[party]["num_steps"])
                self.watch.on_state(party, doing(told[party]))


def _check(name: str, process: Supervised) -> None:
    if process.pid is not None or process.failures < _PATIENCE:
        return
    lines = process.log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.startswith("error [")), f"it ends with {process.last_exit}")
    what = f"the process of {name} does not stay up: {said.removeprefix('error ')}"
    raise RunPaused("NO_PROGRESS", what, where=str(process.log), fix="mend that, then run the same command again")


def _check_server(now: RunStatus, process: Supervised, unseen_s: float) -> None:
    if unseen_s > _SERVER_S:
        what = f"the server does not come up in {_SERVER_S:.0f} s"
        raise RunPaused("NO_PROGRESS", what, where=str(process.log), fix=f"{now.next}; then run the same command again")


def _pause(run: Path) -> None:
    # The server's process of the run ends in order, at the last committed round.
    want(run, "pause")
    until = time.monotonic() + _PAUSE_S
    while is_worked_on(run) and time.monotonic() < until:
        time.sleep(_LOOK_S)


def _result_or_error(run: Path) -> RunResult:
    now = run_status(run)
    if now.state in ("SUCCESS", "PARTIAL") and (result := read_result(run)):
        return result
    # What was asked for counts, not what the run happened to be doing then.
    code = "INTERRUPTED" if wanted(run) == "pause" else verdict(run).get("code") or "INTERRUPTED"
    if now.state == "STOPPED":
        raise RunFailed("RUN_STOPPED", now.why, where=str(run), fix="the same command begins a new run")
    if code == "DISK_FULL":
        raise ResourceError(code, now.why, where=str(run), fix="free some space, then run the same command again")
    error = RunPaused if now.state == "PAUSED" else RunFailed
    mend = "" if code == "INTERRUPTED" else "mend that, then "
    raise error(code, now.why, where=str(run), fix=f"{mend}run the same command again")
