"""What people want of a run between machines, and what is going on in it: small files in its folder."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any, Literal

from fedllm.runs.folder import now
from fedllm.runs.jsonl import write_json

Wanted = Literal["run", "pause", "stop"]

# A run that paused for one of these is taken up again by itself; all else waits for `fedllm resume`.
PASSES = frozenset({"INTERRUPTED", "PARTY_LOST", "ROUND_TIMEOUT", "QUORUM", "SUM_ABORTED"})
CONTROL = "control.json"
# In the state folder of a site: held as long as `fedllm serve` or `join` runs there.
SUPERVISOR_LOCK = ".supervisor"


def want(run: Path, wanted: Wanted) -> None:
    """Write what is wanted of a run; whoever keeps it acts on it within a second.

    Args:
        run: The run folder.
        wanted: `run`, `pause` or `stop`.
    """
    write_json(run / CONTROL, {"wanted": wanted, "time": now()})


def wanted(run: Path) -> Wanted | None:
    """Return what is wanted of a run, or None for a run of one machine, which nobody keeps.

    Args:
        run: The run folder.
    """
    found = read_object(run / CONTROL).get("wanted")
    return found if found in ("run", "pause", "stop") else None


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object, or an empty one while there is none.

    Args:
        path: The file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def verdict(run: Path) -> dict[str, Any]:
    """Return a run's `result.json`, or an empty object before there is one.

    Args:
        run: The run folder.
    """
    return read_object(run / "result.json")


def is_worked_on(run: Path) -> bool:
    """Return whether a process has the run folder open.

    Args:
        run: The run folder.
    """
    return is_held(run / ".lock")


def is_held(lock: Path) -> bool:
    """Return whether a process holds a lock. To find out, it is shared for a moment: who takes it must try twice.

    Args:
        lock: The file.
    """
    try:
        with lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
