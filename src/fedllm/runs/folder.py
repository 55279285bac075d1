"""The run folder: who may write to it, its journal and events, and where each file is."""

from __future__ import annotations

import json
import re
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedllm.disk import disk_error, hold
from fedllm.errors import ConfigError
from fedllm.runs.jsonl import append_rows, read_rows, write_json
from fedllm.runs.metrics import RowFile

if TYPE_CHECKING:
    from fedllm.runs.checkpoint import Generations

# What a start writes before local.json, from which on the run can be resumed.
_START = {".lock", *(name + end for name in ("run.json", "job.yaml", "config.json") for end in ("", ".tmp"))}
_START.add("local.json.tmp")
_PATIENCE_S = 30.0
_IDENTITY = {"run_id": "[0-9a-f]{32}", "job_digest": "[0-9a-f]{64}"}
# In a run that was made to be audited: what was planted, by which it can be made again. No text of it.
CANARIES = "canaries.json"
# And what could be read off the updates of its parties: counts alone.
UPDATES = "updates.json"


def check_free(path: Path) -> None:
    """Raise when a folder cannot take a new run.

    Args:
        path: The folder.

    Raises:
        ConfigError: `RUN_EXISTS`.
    """
    found = {item.name for item in path.iterdir()} if path.is_dir() else set()
    if (path.exists() and not path.is_dir()) or found - _START:
        raise ConfigError(
            "RUN_EXISTS",
            "the folder is not empty",
            where=str(path),
            fix=f"`fedllm resume {path}` goes on with a run there; `--output` names another folder",
        )


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
    _parties: list[IO[str]] = field(default_factory=list)

    @classmethod
    def create(cls, path: Path, *, job_digest: str) -> RunFolder:
        """Return a new, locked run folder.

        Args:
            path: The folder; it must be absent or empty, or hold a start that broke off before anything ran.
            job_digest: The job that will run in it.

        Raises:
            ConfigError: `RUN_EXISTS`.
        """
        check_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, path) from None
        run = cls(path, uuid.uuid4().hex, job_digest, _locked(path))
        try:
            # Another process may have been here in between.
            check_free(path)
            write_json(path / "run.json", {"run_id": run.run_id, "job_digest": job_digest})
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: Path, *, patience_s: float = 0.0) -> RunFolder:
        """Return an existing run folder, locked.

        Args:
            path: The folder.
            patience_s: For how long to wait for another process to be done with it, in seconds.

        Raises:
            ConfigError: `RUN_NOT_FOUND` or `RUN_EXISTS` (another process has it).
        """
        identity = run_identity(path)
        return cls(path, identity["run_id"], identity["job_digest"], _locked(path, patience_s=patience_s))

    def close(self) -> None:
        """Unlock the folder and the parties in it."""
        for lock in [self._lock, *self._parties]:
            if lock is not None:
                lock.close()

    def hold_party(self, party: str) -> None:
        """Lock a party's folder, so that no process left over from a crash works in it at the same time.

        Args:
            party: The party.

        Raises:
            ConfigError: `RUN_EXISTS`, another process has it and does not end.
        """
        folder = self.path / "parties" / party
        folder.mkdir(parents=True, exist_ok=True)
        self._parties.append(_locked(folder, patience_s=_PATIENCE_S))

    def checkpoints(self) -> Generations:
        """Return the server's checkpoints."""
        # Who only looks at a run, or keeps its processes, does without torch.
        from fedllm.runs.checkpoint import Generations

        return Generations(self.path / "checkpoints", "server", self.job_digest, self.run_id)

    def party_states(self, party: str) -> Generations:
        """Return a party's own checkpoints; one more is kept, for the round not yet committed."""
        from fedllm.runs.checkpoint import Generations

        folder = self.path / "parties" / party / "checkpoints"
        return Generations(folder, party, self.job_digest, self.run_id, keep=3)

    def next_epoch(self) -> int:
        """Return the number of this start of the run, above that of every start before; it is kept durably.

        It is at least the clock's seconds, so that a folder restored from a backup does not count from behind.
        """
        path = self.path / "epoch.json"
        epoch = max(int(time.time()), _epoch_in(path) + 1)
        write_json(path, {"epoch": epoch})
        return epoch

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


def _epoch_in(path: Path) -> int:
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["epoch"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


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
    try:
        identity = json.loads((path / "run.json").read_text(encoding="utf-8"))
        found = {name: str(identity[name]) for name in _IDENTITY}
    except (OSError, ValueError, KeyError, TypeError):
        found = {}
    if not all(re.fullmatch(form, found.get(name, "")) for name, form in _IDENTITY.items()):
        what = "no run is in this folder, or its run.json is damaged"
        raise ConfigError("RUN_NOT_FOUND", what, where=str(path), fix="name a folder that `fedllm run` made")
    return found


def _locked(path: Path, *, patience_s: float = 0.0) -> IO[str]:
    fix = "wait for it, or stop it; `--output` names another folder"
    return hold(path / ".lock", "another process is working in this run folder", fix=fix, patience_s=patience_s)
