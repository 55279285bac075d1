"""What a site is doing: whether it is connected to the server, and how far the runs are that it takes part in."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fedllm.identity.files import site_folder
from fedllm.identity.kit import open_kit
from fedllm.job.approval import approvals
from fedllm.job.loading import load_model
from fedllm.job.party import Party
from fedllm.runs.audit_log import AUDIT_FILE, Entry, read_log
from fedllm.runs.control import SUPERVISOR_LOCK, is_held, read_object
from fedllm.runtime.status import modified


@dataclass(frozen=True)
class SiteRun:
    """A run that a site takes part in, as far as the site itself knows."""

    run_id: str
    job: str
    round: int | None
    stage: str
    since: str


@dataclass(frozen=True)
class SiteStatus:
    """A site at this moment. Times are UTC, ISO 8601; empty where nobody knows."""

    party: str
    project: str
    server: str
    state: Literal["CONNECTED", "CONNECTING", "AWAY"]
    why: str
    since: str
    next: str
    runs: tuple[SiteRun, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON value."""
        return asdict(self)


def site_status(party_file: Path, *, site: Path | None = None) -> SiteStatus:
    """Return whether a site is connected, since when, and how far its runs are.

    Args:
        party_file: The site's own file.
        site: The site's folder; by default `site-NAME` beside the file.

    Raises:
        ConfigError: The file is wrong.
        IdentityError: The site has no kit, or it is not as it was signed.
    """
    party, _ = load_model(Party, party_file, overrides=[])
    folder = site_folder(party_file, party.name) if site is None else site
    kit = open_kit(folder)
    state, why, since, next_ = _connection(folder, party_file, f"{kit.host}:{kit.port}")
    log = _entries(folder)
    runs = [
        _run(path, party.name, folder, log.get(path.name))
        for path in sorted((folder / "state" / "runs").glob("*"))
        if path.is_dir()
    ]
    runs.sort(key=lambda run: run.since)
    return SiteStatus(party.name, kit.project, f"{kit.host}:{kit.port}", state, why, since, next_, tuple(runs))


def _connection(
    folder: Path, party_file: Path, server: str
) -> tuple[Literal["CONNECTED", "CONNECTING", "AWAY"], str, str, str]:
    state = folder / "state"
    lock, door = state / SUPERVISOR_LOCK, read_object(state / "door.json")
    since = str(door.get("since", ""))
    if not is_held(lock):
        last = max(since, modified(state / "log.txt"), modified(state / "engine.log"))
        return "AWAY", "`fedllm join` does not run here", last, f"fedllm join {party_file}"
    began, look = modified(lock), f"fedllm doctor --party {party_file}"
    if since < began:
        return "CONNECTING", f"on its way to the server at {server}", began, look
    if door.get("connected"):
        return "CONNECTED", "", since, "fedllm approve job.yaml --party party.yaml, for jobs that are new"
    return "CONNECTING", f"the server at {server} cannot be reached; it is tried again by itself", since, look


def _entries(folder: Path) -> dict[str, list[Entry]]:
    """Return the lines of the site's audit log by run."""
    found: dict[str, list[Entry]] = {}
    if (folder / AUDIT_FILE).exists():
        for _, _, entry in read_log(folder / AUDIT_FILE):
            if entry is not None and entry.run_id is not None:
                found.setdefault(entry.run_id, []).append(entry)
    return found


def _run(path: Path, party: str, folder: Path, entries: list[Entry] | None) -> SiteRun:
    own = path / "parties" / party
    rounds = (file.stem.removeprefix("round-") for file in (own / "checkpoints").glob("round-*.ckpt"))
    kept = max((int(number) for number in rounds if number.isdigit()), default=None)
    names = {approval.job_digest: approval.job_name for approval in approvals(folder)}
    digest = next((entry.job_digest for entry in entries or () if entry.job_digest), None)
    if entries:
        stage, since = _stage(entries[-1]), entries[-1].time
    else:
        stage = "no round is kept yet" if kept is None else f"its state of round {kept} is kept"
        since = max(modified(own / "metrics.jsonl"), modified(own / "checkpoints"), modified(own / "data.json"))
    if is_held(own / ".lock"):
        stage += "; its process runs"
    return SiteRun(path.name, names.get(str(digest), ""), kept, stage, since)


def _stage(entry: Entry) -> str:
    at = "" if entry.round is None else f" of round {entry.round}"
    if entry.event == "operation":
        return f"{entry.way} {entry.kind}{at}"
    words = {"run_joined": "takes part", "round_committed": "state kept", "run_finished": "ended"}
    code = f" [{entry.code}]" if entry.code else ""
    return f"{words.get(entry.event, entry.event.replace('_', ' '))}{at}{code}"
