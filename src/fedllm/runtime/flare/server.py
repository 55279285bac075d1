"""What the server's job process does, apart from FLARE: open the run, drive it, write its verdict."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedllm.errors import ConfigError
from fedllm.identity.kit import open_kit
from fedllm.runs.audit_log import AUDIT_FILE, AuditLog
from fedllm.runs.folder import RunFolder, now, run_identity
from fedllm.runs.jsonl import write_json
from fedllm.runs.plan_files import read_plan
from fedllm.runtime.base import SERVER
from fedllm.runtime.flare.channel import Channel
from fedllm.runtime.flare.lines import ServerLines
from fedllm.runtime.flare.link import FlareLink
from fedllm.runtime.flare.seal import seal_of
from fedllm.runtime.guard import AuditedLink, Auditor
from fedllm.runtime.run import carry_out, concluding
from fedllm.wire.spool import Spool

_LIVE_S = 0.5
_LOCK_S = 10.0


def run_folder(site: Path, run_id: str) -> Path:
    """Return the folder of a run at the coordinator.

    Args:
        site: The server's site folder.
        run_id: The run.

    Raises:
        ConfigError: `RUN_NOT_FOUND`.
    """
    for path in sorted((site / "state" / "runs").iterdir()):
        if (path / "run.json").is_file() and run_identity(path)["run_id"] == run_id:
            return path
    raise ConfigError("RUN_NOT_FOUND", "the job belongs to no run of this server", where=run_id)


def drive_run(
    site: Path, run_id: str, make_channel: Callable[[list[str]], Channel], *, aborted: Callable[[], bool]
) -> None:
    """Drive a run to its end, or until it pauses; the verdict is in its folder.

    Args:
        site: The server's site folder.
        run_id: The run.
        make_channel: A channel to the parties, given in the job's order.
        aborted: Says when the job is being stopped.
    """
    path = run_folder(site, run_id)
    job, parties = read_plan(path)
    # Whoever looks at whether a run is worked on holds its lock for a moment.
    run = RunFolder.open(path, patience_s=_LOCK_S)
    done = threading.Event()
    try:
        if run.last_commit() is not None:
            run.event("run_resumed")
        with concluding(run):
            kit, channel = open_kit(site), make_channel(job.parties)
            link = FlareLink(
                channel,
                spool=Spool(path / "spool"),
                seal=seal_of(kit),
                lines=ServerLines(kit, channel.job_id, channel.peers),
                aborted=aborted,
                on_stale=partial(_note_late, run),
            )
            for party in job.parties:
                if party not in link.parties:
                    run.event("party_failed", round_=(run.last_commit() or 0) + 1, party=party, code="PARTY_LOST")
            threading.Thread(target=_tell, args=(path, link, done), daemon=True).start()
            log = AuditLog.open(site / AUDIT_FILE, actor=SERVER)
            audited = AuditedLink(link, log, run_id=run.run_id, job_digest=run.job_digest)
            auditor = Auditor(log, run.run_id, run.job_digest)
            carry_out(run, job, parties, audited, auditor=auditor)
    finally:
        done.set()
        run.close()


def _note_late(run: RunFolder, party: str) -> None:
    run.event("answer_late", round_=(run.last_commit() or 0) + 1, party=party, code="STALE_ROUND")


def _tell(path: Path, link: FlareLink, done: threading.Event) -> None:
    while not done.wait(_LIVE_S):
        parties = {
            party: {
                "stage": seen.stage,
                "step": seen.step,
                "num_steps": seen.num_steps,
                "silent_s": round(max(0.0, time.monotonic() - seen.at), 1),
            }
            for party, seen in link.seen.items()
        }
        waiting = {party: round(time.time() - since, 1) for party, since in dict(link.waiting).items()}
        write_json(path / "live.json", {"time": now(), "parties": parties, "waiting_s": waiting})
