"""What a run is doing: its state, who is waited for, since when and why, and the next command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedllm.errors import ExitCode
from fedllm.identity.files import SERVER
from fedllm.runs.control import CONTROL, PASSES, SUPERVISOR_LOCK, is_held, is_worked_on, read_object, verdict
from fedllm.runs.folder import last_commit, run_identity
from fedllm.runs.jsonl import read_rows

# The clerk writes every half second, and so does a run's process at the server.
STALE_S = 4.0
_SILENT_S = 3.0
_HANGS_S = 60.0
_FULL_BYTES = 2**24

# What a party last said that it does -> in words.
_STAGES = {
    "starting": "on its way up",
    "loading": "loads base model and data",
    "ready": "asked",
    "fetching": "fetches the adapter",
    "training": "trains",
    "answering": "sends its answer",
}
# Why a run paused -> what a person does about it, there or here.
_MENDS = {
    "NOT_APPROVED": "fedllm approve job.yaml --party party.yaml",
    "DATA_NOT_FOUND": "fedllm doctor job.yaml --party party.yaml",
    "MODEL_NOT_FOUND": "fedllm doctor job.yaml --party party.yaml",
    "DISK_FULL": "free some space",
}


@dataclass(frozen=True)
class Waiting:
    """Somebody who is waited for: a party, `server`, or `coordinator` where a person there has to act."""

    who: str
    since: str
    why: str


@dataclass(frozen=True)
class RunStatus:
    """A run at this moment. Times are UTC, ISO 8601; empty where nobody knows."""

    path: Path
    state: str
    round: int | None
    num_rounds: int
    why: str
    since: str
    next: str
    waiting: tuple[Waiting, ...] = ()

    @property
    def goes_on(self) -> bool:
        """Whether it goes on without anybody at the coordinator doing anything."""
        return self.state in ("RUNNING", "STARTING", "WAITING")

    @property
    def exit_code(self) -> ExitCode:
        """The exit code that fits what became of the run."""
        if self.state in ("FAILED", "STOPPED"):
            return ExitCode.FAILED
        return ExitCode.PAUSED if self.state == "PAUSED" else ExitCode.OK

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON value."""
        return asdict(self) | {"path": str(self.path), "waiting": [asdict(who) for who in self.waiting]}


def run_status(run: Path) -> RunStatus:
    """Return what a run is doing, who is waited for, since when and why, and the next command.

    Args:
        run: The run folder, of a run between machines or of one on this machine.

    Raises:
        ConfigError: `RUN_NOT_FOUND`.
    """
    look = _Look.at(run)
    return next(found for rule in _RULES if (found := rule(look)))


@dataclass(frozen=True)
class _Look:
    """All that the files say about a run."""

    path: Path
    parties: tuple[str, ...]
    num_rounds: int
    control: dict[str, Any]
    found: dict[str, Any]
    live: dict[str, Any]
    clerk: dict[str, Any]
    events: list[dict[str, Any]]

    @classmethod
    def at(cls, path: Path) -> _Look:
        run_identity(path)
        # The same values as in job.yaml, which takes a hundred times as long to read.
        values = {row["key"]: row["value"] for row in read_object(path / "config.json").get("values", ())}
        return cls(
            path=path,
            parties=tuple(values.get("parties", ())),
            num_rounds=int(values.get("federation.num_rounds", 0)),
            control=read_object(path / CONTROL),
            found=verdict(path),
            live=read_object(path / "live.json"),
            clerk=read_object(path.parent.parent / "clerk.json"),
            events=read_rows(path / "events.jsonl"),
        )

    @property
    def state_folder(self) -> Path:
        return self.path.parent.parent

    @property
    def kept(self) -> dict[str, Any]:
        """What the clerk says of the run."""
        kept = self.clerk.get("runs", {}).get(self.path.name, {})
        return kept if isinstance(kept, dict) else {}

    @property
    def last_event(self) -> str:
        return str(self.events[-1]["time"]) if self.events else ""

    def made(self, state: str, why: str, *, since: str, next_: str, waiting: tuple[Waiting, ...] = ()) -> RunStatus:
        return RunStatus(self.path, state, last_commit(self.path), self.num_rounds, why, since, next_, waiting)


def _at_work(look: _Look) -> RunStatus | None:
    if not is_worked_on(look.path):
        return None
    logs = f"fedllm logs {look.path} --follow"
    wanted, asked = look.control.get("wanted"), str(look.control.get("time", ""))
    if wanted in ("pause", "stop"):
        ends = Waiting(SERVER, asked, "ends its process of the run")
        why = f"it is being {'paused' if wanted == 'pause' else 'stopped'} at its last committed round"
        return look.made("RUNNING", why, since=asked, next_=f"fedllm status {look.path} --follow", waiting=(ends,))
    if wanted is None:
        return look.made("RUNNING", _at_round(look), since=look.last_event, next_=logs)
    began = modified(look.path / ".lock")
    told = str(look.live.get("time", ""))
    if told < began:
        waiting = (Waiting(SERVER, began, "opens the run"),)
        return look.made("STARTING", "the server opens the run", since=began, next_=logs, waiting=waiting)
    if age_s(told) > STALE_S:
        waiting = (Waiting(SERVER, told, "its process of the run gives no sign of life"),)
        why = "the server's process of the run gives no sign of life"
        return look.made("RUNNING", why, since=told, next_=_server_log(look), waiting=waiting)
    return _asking(look, logs)


def _asking(look: _Look, logs: str) -> RunStatus:
    asked: dict[str, float] = look.live.get("waiting_s", {})
    seen: dict[str, dict[str, Any]] = look.live.get("parties", {})
    waiting = tuple(
        Waiting(party, _before(look.live["time"], seconds), doing(seen.get(party, {})))
        for party, seconds in asked.items()
    )
    silent = [party for party in asked if seen.get(party, {}).get("silent_s", 0.0) > _SILENT_S]
    why = f"waiting for {', '.join(asked)}" if asked else _at_round(look)
    since = min((who.since for who in waiting), default=look.last_event)
    if away := [party for party in look.parties if party not in seen]:
        why += f"; without {', '.join(away)}, who is away and is let in when back"
    next_ = _there(silent or away, "fedllm status party.yaml") if silent or away else logs
    return look.made("RUNNING", why, since=since, next_=next_, waiting=waiting)


def _at_round(look: _Look) -> str:
    done = last_commit(look.path)
    if done is not None and done >= look.num_rounds:
        return "writes the adapter and the report"
    return f"at work on round {0 if done is None else done + 1}"


def doing(seen: dict[str, Any]) -> str:
    """Return in words what a party last said that it does, and for how long it has been silent.

    Args:
        seen: `stage`, `step`, `num_steps` and `silent_s`, as far as they are known.
    """
    stage = str(seen.get("stage", "starting"))
    words = _STAGES.get(stage, stage)
    if seen.get("num_steps"):
        words += f", step {seen['step']}/{seen['num_steps']}"
    if seen.get("silent_s", 0.0) > _SILENT_S:
        return f"silent for {seen['silent_s']:.0f} s, last known: {words}"
    return words


def _over(look: _Look) -> RunStatus | None:
    status = look.found.get("status")
    since = modified(look.path / "result.json")
    if status in ("SUCCESS", "PARTIAL"):
        return look.made(status, look.found["reason"], since=since, next_=f"fedllm eval {look.path}")
    if status == "FAILED":
        mend = f"mend what the reason names; then: fedllm resume {look.path}"
        waiting = tuple(Waiting(who, since, look.found["reason"]) for who in _where(look) or ["coordinator"])
        return look.made("FAILED", look.found["reason"], since=since, next_=mend, waiting=waiting)
    return None


def _stopped(look: _Look) -> RunStatus | None:
    if look.control.get("wanted") != "stop":
        return None
    next_ = "fedllm submit job.yaml (a new run; a stopped one does not go on)"
    return look.made("STOPPED", "it was stopped for good", since=str(look.control.get("time", "")), next_=next_)


def _asked_to_pause(look: _Look) -> RunStatus | None:
    if look.control.get("wanted") != "pause":
        return None
    since = str(look.control.get("time", ""))
    waiting = (Waiting("coordinator", since, "asked for the pause"),)
    next_ = f"fedllm resume {look.path}"
    return look.made("PAUSED", "it was asked to pause", since=since, next_=next_, waiting=waiting)


def _on_one_machine(look: _Look) -> RunStatus | None:
    if look.control:
        return None
    ended = "its process ended without a word: it was killed, or the machine went down"
    why = look.found.get("reason") or ended
    since = modified(look.path / "result.json") or look.last_event
    waiting = (Waiting("coordinator", since, "a person has to take it up again"),)
    return look.made("PAUSED", why, since=since, next_=f"fedllm resume {look.path}", waiting=waiting)


def _needs_a_person(look: _Look) -> RunStatus | None:
    code = str(look.found.get("code"))
    if look.found.get("status") != "PAUSED" or code in PASSES:
        return None
    since, who = modified(look.path / "result.json"), _where(look)
    resume, mend = f"fedllm resume {look.path}", _MENDS.get(code, "")
    if who:
        mend = _there(who, mend or "see state/log.txt in the site's folder")
    elif code == "NO_PROGRESS":
        mend = f"see {look.state_folder / 'log.txt'} and the logs of the parties"
    next_ = f"{mend}; then here: {resume}" if who else f"{mend}; then: {resume}" if mend else resume
    waiting = tuple(Waiting(party, since, look.found["reason"]) for party in who or ["coordinator"])
    return look.made("PAUSED", look.found["reason"], since=since, next_=next_, waiting=waiting)


def _disk_is_full(look: _Look) -> RunStatus | None:
    # Where nothing can be written, no verdict and no sign of life is, either.
    free = shutil.disk_usage(look.path).free
    if free > _FULL_BYTES:
        return None
    why = f"the disk is full: {free / 1e6:.0f} MB free at {look.path}"
    waiting = (Waiting("coordinator", look.last_event, why),)
    return look.made("WAITING", why, since=look.last_event, next_="free some space there", waiting=waiting)


def _server_away(look: _Look) -> RunStatus | None:
    lock, last = look.state_folder / SUPERVISOR_LOCK, str(look.clerk.get("time", ""))
    if not is_held(lock):
        since = last or str(look.control.get("time", ""))
        waiting = (Waiting(SERVER, since, "does not run"),)
        serve = f"fedllm serve {project_of(look.path)}"
        return look.made("WAITING", "the server does not run", since=since, next_=serve, waiting=waiting)
    if age_s(last) < STALE_S:
        return None
    since = max(last, modified(lock))
    if age_s(since) < _HANGS_S:
        waiting = (Waiting(SERVER, since, "on its way up"),)
        next_ = f"fedllm status {look.path} --follow"
        return look.made("STARTING", "the server is on its way up", since=since, next_=next_, waiting=waiting)
    waiting = (Waiting(SERVER, since, "gives no sign of life"),)
    why = "the server gives no sign of life"
    return look.made("WAITING", why, since=since, next_=_server_log(look), waiting=waiting)


def _parties_away(look: _Look) -> RunStatus | None:
    missing = [str(party) for party in look.kept.get("waiting_for", ())]
    if not missing:
        return None
    since = str(look.kept.get("since", ""))
    waiting = tuple(Waiting(party, since, "not connected to the server") for party in missing)
    why = look.found.get("reason") or f"not connected: {', '.join(missing)}"
    next_ = _there(missing, "fedllm join party.yaml")
    return look.made("WAITING", why, since=since, next_=next_, waiting=waiting)


def _starting(look: _Look) -> RunStatus:
    since = modified(look.path / "result.json") or max(look.last_event, str(look.control.get("time", "")))
    why = "the processes of the run are on their way up"
    if reason := look.found.get("reason") or look.kept.get("why"):
        why = f"it is tried again: {reason}"
    waiting = tuple(Waiting(who, since, "its process of the run is on its way up") for who in (SERVER, *look.parties))
    return look.made("STARTING", why, since=since, next_=f"fedllm status {look.path} --follow", waiting=waiting)


# The first that has something to say decides; the last always has.
_RULES: tuple[Callable[[_Look], RunStatus | None], ...] = (
    _at_work,
    _over,
    _stopped,
    _asked_to_pause,
    _on_one_machine,
    _needs_a_person,
    _disk_is_full,
    _server_away,
    _parties_away,
    _starting,
)


def _there(parties: list[str], command: str) -> str:
    return f"at {', '.join(parties)}: {command}"


def _where(look: _Look) -> list[str]:
    """Return the parties where a run's verdict comes from."""
    what, _, names = str(look.found.get("where", "")).partition(" ")
    return [name for name in names.split(", ") if name in look.parties] if what == "party" else []


def _server_log(look: _Look) -> str:
    return f"see {look.state_folder / 'log.txt'}, and {look.state_folder / 'engine.log'}"


def project_of(run: Path) -> str:
    """Return the project file of a run at a coordinator, as it is named by default.

    Args:
        run: The run folder.
    """
    # PROJECT/coordinator/site/state/runs/NAME
    file = run.resolve().parents[4] / "project.yaml"
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def age_s(moment: str) -> float:
    """Return how many seconds ago a moment was; infinite where it is not known.

    Args:
        moment: ISO 8601, with a time zone.
    """
    if not moment:
        return float("inf")
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


def modified(path: Path) -> str:
    """Return when a file was written, or an empty text where there is none.

    Args:
        path: The file.
    """
    try:
        moment = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:
        return ""
    return moment.isoformat(timespec="milliseconds")


def _before(moment: str, seconds: float) -> str:
    return (datetime.fromisoformat(moment) - timedelta(seconds=seconds)).isoformat(timespec="milliseconds")
