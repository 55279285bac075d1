"""Keeps the runs of a coordinator, inside FLARE's server process: starts each as a job of FLARE, and again after a
crash, until it is finished or somebody wants it paused. Nobody can submit a job from another machine.
"""

from __future__ import annotations

import errno
import logging
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey, RunStatus
from nvflare.fuel.utils.zip_utils import zip_directory_to_bytes
from nvflare.lighter.utils import load_private_key_file, sign_folders
from nvflare.private.fed.server.job_meta_validator import JobMetaValidator

from fedllm.job.job import Job
from fedllm.runs.control import PASSES, is_worked_on, verdict, wanted
from fedllm.runs.folder import RunFolder, last_commit, now, run_identity
from fedllm.runs.jsonl import write_json
from fedllm.runs.plan_files import read_plan
from fedllm.runtime.flare.jobs import write_job
from fedllm.runtime.run import conclude

_log = logging.getLogger("fedllm.clerk")
_LOOK_S = 0.5
_FINAL = {"SUCCESS", "PARTIAL", "FAILED"}
# A job that has not begun to work on its run after so long is taken back.
_START_S = 90.0
_PATIENCE = 5
# A cut connection has so long to come back before the process behind it counts as ended.
_RECONNECT_S = 2.0
_NO_SPACE = f"[Errno {errno.ENOSPC}]"
_PAUSE_S = (0.0, 1.0, 3.0, 10.0, 20.0)


@dataclass
class Attempts:
    """One run's jobs of FLARE: the present one, and how many in a row brought it no further."""

    job_id: str | None = None
    since: float = 0.0
    began: bool = False
    in_vain: int = 0
    committed: int | None = None
    waiting_since: str = ""
    waits: float | None = None
    waiting_for: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    gone: dict[str, float] = field(default_factory=dict)
    why: str = ""


class Clerk(FLComponent):
    """One per server. FLARE makes it when it starts; it works in a thread of its own.

    Args:
        site: The server's site folder.
        admin: The folder of the identity that signs jobs.
    """

    def __init__(self, site: str, admin: str) -> None:
        super().__init__()
        self._site, self._admin = Path(site), Path(admin)
        self._runs: dict[Path, Attempts] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin when FLARE's server is up.

        Args:
            event_type: What happens.
            fl_ctx: FLARE's context.
        """
        if event_type == EventType.SYSTEM_START:
            threading.Thread(target=self._work, args=(fl_ctx.get_engine(),), daemon=True, name="clerk").start()

    def _work(self, engine: Any) -> None:
        while True:
            try:
                with engine.new_context() as fl_ctx:
                    clients = _connected(engine)
                    for path in sorted((self._site / "state" / "runs").glob("*/control.json")):
                        self._look(path.parent, clients, engine, fl_ctx)
                    self._write_status(clients)
            except Exception:  # noqa: BLE001
                # The clerk outlives whatever goes wrong with one look; the next may go well.
                _log.exception("the clerk stumbled")
            time.sleep(_LOOK_S)

    def _look(self, run: Path, clients: list[str], engine: Any, fl_ctx: FLContext) -> None:
        attempts = self._runs.setdefault(run, Attempts(committed=last_commit(run)))
        want = wanted(run)
        if is_worked_on(run):
            attempts.began = True
            stops = want != "run" or self._lets_in(run, attempts, clients) or self._has_lost(attempts, engine)
            if attempts.job_id and stops:
                engine.job_runner.stop_run(attempts.job_id, fl_ctx)
            return
        if attempts.job_id and not attempts.began and self._is_on_its_way(attempts, engine, fl_ctx):
            return
        self._close(run, attempts, fl_ctx, engine)
        found = verdict(run)
        if want != "run" or found.get("status") in _FINAL or not self._may_go_on(found):
            attempts.waiting_for = []
            return
        self._begin(run, attempts, clients, engine, fl_ctx)

    @staticmethod
    def _lets_in(run: Path, attempts: Attempts, clients: list[str]) -> bool:
        """Return whether a party is back that the job went on without, and a round has just been committed."""
        if not attempts.missing or last_commit(run) == attempts.committed:
            return False
        return any(party in clients for party in attempts.missing)

    @staticmethod
    def _has_lost(attempts: Attempts, engine: Any) -> bool:
        """Return whether the process of a party ended: its connection to this one is gone and does not come back."""
        job = f".{attempts.job_id}"
        there = {name.removesuffix(job) for name in list(engine.get_cell().core_cell.agents) if name.endswith(job)}
        attempts.seen |= there
        moment = time.monotonic()
        attempts.gone = {name: attempts.gone.get(name, moment) for name in attempts.seen - there}
        lost = sorted(name for name, since in attempts.gone.items() if moment - since > _RECONNECT_S)
        if lost:
            attempts.why = f"the process of {', '.join(lost)} ended"
            if attempts.waits is None:
                attempts.waits, attempts.waiting_since = min(attempts.gone[name] for name in lost), now()
        return bool(lost)

    @staticmethod
    def _may_go_on(found: dict[str, Any]) -> bool:
        return found.get("status") != "PAUSED" or found.get("code") in PASSES

    def _is_on_its_way(self, attempts: Attempts, engine: Any, fl_ctx: FLContext) -> bool:
        job = engine.job_def_manager.get_job(attempts.job_id, fl_ctx)
        status = job.meta.get(JobMetaKey.STATUS.value) if job else None
        ended = status not in (RunStatus.SUBMITTED.value, RunStatus.DISPATCHED.value, RunStatus.RUNNING.value)
        if ended and job:
            attempts.why = _why_not(job.meta.get(JobMetaKey.JOB_DEPLOY_DETAIL.value) or []) or str(status)
        return not ended and time.monotonic() - attempts.since < _START_S

    def _close(self, run: Path, attempts: Attempts, fl_ctx: FLContext, engine: Any) -> None:
        if attempts.job_id is None:
            return
        engine.job_runner.stop_run(attempts.job_id, fl_ctx)
        committed = last_commit(run)
        attempts.in_vain = 0 if committed != attempts.committed else attempts.in_vain + 1
        attempts.job_id, attempts.committed = None, committed
        if attempts.in_vain >= _PATIENCE and verdict(run).get("status") not in _FINAL:
            what = f"{attempts.in_vain} attempts in a row brought the run no further"
            _verdict(run, f"{what}: {attempts.why or 'see the logs of server and parties'}", code="NO_PROGRESS")
            attempts.in_vain = 0

    def _begin(self, run: Path, attempts: Attempts, clients: list[str], engine: Any, fl_ctx: FLContext) -> None:
        job, _ = read_plan(run)
        attempts.waiting_for = [party for party in job.parties if party not in clients]
        if attempts.waiting_for and not self._goes_without(run, job, attempts):
            return
        pause = _PAUSE_S[min(attempts.in_vain, len(_PAUSE_S) - 1)]
        if time.monotonic() - attempts.since < pause:
            return
        attempts.missing, attempts.waiting_for = attempts.waiting_for, []
        attempts.waiting_since, attempts.waits = "", None
        (run / "result.json").unlink(missing_ok=True)
        present = [party for party in job.parties if party not in attempts.missing]
        attempts.job_id = self._submit(run, job, present, engine, fl_ctx)
        attempts.since, attempts.began = time.monotonic(), False
        attempts.seen, attempts.gone = set(), {}
        _log.info("run %s: job %s of FLARE is submitted", run.name, attempts.job_id)

    @staticmethod
    def _goes_without(run: Path, job: Job, attempts: Attempts) -> bool:
        """Return whether the run goes on without the parties that are away: after `round_timeout`, with a quorum."""
        if attempts.waits is None:
            attempts.waits, attempts.waiting_since = time.monotonic(), now()
        if time.monotonic() - attempts.waits < job.federation.round_timeout:
            return False
        present = len(job.parties) - len(attempts.waiting_for)
        # The first round needs all: what must be equal everywhere is compared before it.
        if present >= job.federation.min_parties and last_commit(run) is not None:
            return True
        if verdict(run).get("code") != "QUORUM":
            away = ", ".join(attempts.waiting_for)
            what = f"{away} not connected; {present} of at least {job.federation.min_parties} parties are there"
            _verdict(run, what, code="QUORUM")
        return False

    def _submit(self, run: Path, job: Job, parties: list[str], engine: Any, fl_ctx: FLContext) -> str:
        with tempfile.TemporaryDirectory(dir=run) as scratch:
            folder = write_job(
                Path(scratch),
                job=job.model_dump(mode="json"),
                name=job.name,
                parties=parties,
                run_id=run_identity(run)["run_id"],
            )
            # Each site of FLARE checks the signature against the authority, and what its signer may do.
            sign_folders(str(folder), load_private_key_file(str(self._admin / "key.pem")), self._admin_certificate())
            data = zip_directory_to_bytes(scratch, job.name)
        valid, error, meta = JobMetaValidator().validate(job.name, data)
        if not valid:
            raise RuntimeError(error)
        meta |= {
            JobMetaKey.JOB_FOLDER_NAME.value: job.name,
            JobMetaKey.SUBMITTER_NAME.value: "admin",
            JobMetaKey.SUBMITTER_ORG.value: "fedllm",
            JobMetaKey.SUBMITTER_ROLE.value: "project_admin",
        }
        made = engine.job_def_manager.create(meta, data, fl_ctx)
        return str(made[JobMetaKey.JOB_ID.value])

    def _admin_certificate(self) -> str:
        return str(self._admin / "kit" / "cert.pem")

    def _write_status(self, clients: list[str]) -> None:
        runs = {
            run.name: {
                "attempts_in_vain": attempts.in_vain,
                "waiting_for": attempts.waiting_for,
                "since": attempts.waiting_since,
                "why": attempts.why,
                "job_id": attempts.job_id,
            }
            for run, attempts in self._runs.items()
        }
        facts = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "connected": clients, "runs": runs}
        write_json(self._site / "state" / "clerk.json", facts)


def _connected(engine: Any) -> list[str]:
    """Return the parties whose connection stands; FLARE itself keeps one that ended on its list for a minute."""
    standing = set(engine.get_cell().core_cell.agents)
    return sorted(client.name for client in engine.get_clients() if client.name in standing)


def _why_not(told: list[str]) -> str:
    """Return which sites did not take a job, from FLARE's "SITE: WHAT"; a site's own words stay in its log."""
    found = {}
    for site, _, what in (line.partition(": ") for line in told):
        if what not in ("", "OK") and site != "invalid_clients":
            found[site] = "DISK_FULL" if _NO_SPACE in what else "the job cannot be begun there"
    return ", ".join(f"{site}: {why}" for site, why in found.items())


def _verdict(run: Path, reason: str, *, code: str) -> None:
    folder = RunFolder.open(run, patience_s=1.0)
    try:
        conclude(folder, "PAUSED", reason, code=code)
    finally:
        folder.close()
