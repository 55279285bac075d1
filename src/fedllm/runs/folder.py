"""The run folder: who may write to it, its journal and events, and where each file is."""

from __future__ import annotations

import fcntl
import os
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from fedllm.errors import ConfigError
from fedllm.runs.checkpoint import Generations
from fedllm.runs.jsonl import append_rows, read_rows, write_json
from fedllm.runs.metrics import RowFile


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass
class RunFolder:
    """A run on disk. Open one with `create` or `open`; both lock it against a second process."""

    path: Path
    run_id: str
    job_digest: str
    _lock: IO[str] | None

    @classmethod
    def create(cls, path: Path, *, job_digest: str) -> RunFolder:
        """Return a new, locked run folder.

        Args:
            path: The folder; it must be absent or empty.
            job_digest: The job that will run in it.

        Raises:
            ConfigError: `RUN_EXISTS`.
        """
        if path.exists() and any(path.iterdir()):
            raise ConfigError(
                "RUN_EXISTS",
                "the folder is not empty",
                where=str(path),
                fix=f"`fedllm resume {path}` goes on with the run there; `--output` names another folder",
            )
        path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
        run_id = uuid.uuid4().hex
        write_json(path / "run.json", {"run_id": run_id, "job_digest": job_digest})
        return cls(path, run_id, job_digest, lock)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Return an existing run folder, locked.

        Args:
            path: The folder.

        Raises:
            ConfigError: `RUN_NOT_FOUND` or `RUN_EXISTS` (another process has it).
        """
        identity = run_identity(path)
        return cls(path, identity["run_id"], identity["job_digest"], _locked(path))

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.close()

    def checkpoints(self) -> Generations:
        """Return the server's checkpoints."""
        return Generations(self.path / "checkpoints", "server", self.job_digest, self.run_id)

    def party_states(self, party: str) -> Generations:
        """Return a party's own checkpoints; one more is kept, for the round not yet committed."""
        folder = self.path / "parties" / party / "checkpoints"
        return Generations(folder, party, self.job_digest, self.run_id, keep=3)

    def rows(self) -> RowFile:
        """Return the server's metrics file."""
        return RowFile(self.path / "metrics.jsonl")

    def party_rows(self, party: str) -> RowFile:
        """Return a party's own metrics file."""
        folder = self.path / "parties" / party
        folder.mkdir(parents=True, exist_ok=True)
        return RowFile(folder / "metrics.jsonl")

    def event(self, event: str, *, round_: int | None = None, party: str | None = None, **more: str | None) -> None:
        """Add a line to `events.jsonl`, durably.

        Args:
            event: What happened.
            round_: In which round.
            party: To which party.
            more: `code` and `detail`.
        """
        row: dict[str, Any] = {"time": now(), "event": event, "round": round_, "party": party}
        row |= {"code": None, "detail": ""}
        append_rows(self.path / "events.jsonl", [row | more])

    def journal(self, number: int, step: str, **more: str) -> None:
        """Add a line to the journal, durably: `begin` before a round, `commit` after its checkpoint.

        Args:
            number: The round.
            step: `begin`, `commit` or `rollback`.
            more: Digests.
        """
        append_rows(self.path / "journal.jsonl", [{"round": number, "step": step, **more}])

    def last_commit(self) -> int | None:
        """Return the last round that the journal calls committed, or None."""
        return last_commit(self.path)


def last_commit(path: Path) -> int | None:
    """Return the last round that a run's journal calls committed, or None.

    Args:
        path: The run folder.
    """
    last = None
    for row in read_rows(path / "journal.jsonl"):
        if row["step"] in ("commit", "rollback"):
            last = int(row["round"])
    return last


def attach(path: Path, *, run_id: str, job_digest: str) -> RunFolder:
    """Return a run folder that the process which started this one has locked.

    Args:
        path: The folder.
        run_id: The run's id.
        job_digest: The run's job.
    """
    return RunFolder(path, run_id, job_digest, None)


def run_identity(path: Path) -> dict[str, str]:
    """Return `run_id` and `job_digest` of a run folder.

    Args:
        path: The folder.

    Raises:
        ConfigError: `RUN_NOT_FOUND`.
    """
    import json

    try:
        identity = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return {"run_id": identity["run_id"], "job_digest": identity["job_digest"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            "RUN_NOT_FOUND", "no run is in this folder", where=str(path), fix="name a folder that `fedllm run` made"
        ) from None


def _locked(path: Path) -> IO[str]:
    lock = (path / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ConfigError(
            "RUN_EXISTS",
            "another process is working in this run folder",
            where=str(path),
            fix="wait for it, or stop it; `--output` names another folder",
        ) from None
    os.set_inheritable(lock.fileno(), False)
    return lock
