"""A coordinator's folder made by hand, as the server and its clerk leave it; nothing runs."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedllm.runs.control import want
from fedllm.runs.jsonl import append_rows, write_json

PARTIES = ["north", "east"]


def ago(seconds: float) -> str:
    """Return the moment some seconds ago."""
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


@contextmanager
def held(lock: Path, *, since_s: float = 0.0) -> Iterator[None]:
    """Hold a lock as another process would."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        moment = datetime.now().timestamp() - since_s
        os.utime(lock, (moment, moment))
        yield


@dataclass(frozen=True)
class Place:
    """A project's folder with one run in it."""

    root: Path

    @property
    def project_file(self) -> Path:
        return self.root / "project.yaml"

    @property
    def state(self) -> Path:
        return self.root / "coordinator" / "site" / "state"

    @property
    def run(self) -> Path:
        return self.state / "runs" / "tiny-12345678"

    def clerk(self, *, age_s: float = 0.0, connected: list[str] | None = None, **kept: Any) -> None:
        """Write what the clerk last said."""
        facts = {"time": ago(age_s), "connected": connected or [], "runs": {self.run.name: kept}}
        write_json(self.state / "clerk.json", facts)

    def live(self, *, age_s: float = 0.0, waiting_s: dict[str, float] | None = None, **parties: Any) -> None:
        """Write what the run's process at the server last said."""
        facts = {"time": ago(age_s), "parties": parties, "waiting_s": waiting_s or {}}
        write_json(self.run / "live.json", facts)

    def verdict(self, status: str, code: str | None = None, *, where: str = "", reason: str = "why.") -> None:
        """Write the run's verdict."""
        write_json(self.run / "result.json", {"status": status, "code": code, "where": where, "reason": reason})

    def commit(self, *rounds: int) -> None:
        """Note rounds as committed."""
        append_rows(self.run / "journal.jsonl", [{"round": number, "step": "commit"} for number in rounds])


def make_place(root: Path, *, wanted: Any = "run") -> Place:
    """Return a project with a run of three rounds that was submitted a moment ago; None: a run of one machine."""
    place = Place(root)
    place.run.mkdir(parents=True)
    place.project_file.write_text("name: trial\nserver: {host: 127.0.0.1}\nparties: [north, east]\n")
    write_json(place.run / "run.json", {"run_id": "0" * 32, "job_digest": "1" * 64})
    values = {"parties": PARTIES, "federation.num_rounds": 3}
    rows = [{"key": key, "value": value, "origin": "x"} for key, value in values.items()]
    write_json(place.run / "config.json", {"job_digest": "1" * 64, "values": rows})
    event = {"event": "run_started", "round": None, "party": None, "code": None, "detail": ""}
    append_rows(place.run / "events.jsonl", [{"time": ago(100)} | event])
    if wanted is not None:
        want(place.run, wanted)
    return place
