"""`fedllm serve` and `fedllm join`: keep FLARE's process of a site running; its kit is verified at each start."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from fedllm.disk import make_private
from fedllm.errors import ConfigError
from fedllm.identity.files import KIT_FOLDER, CoordinatorFolder, site_folder
from fedllm.identity.kit import MANIFEST, Kit, open_kit
from fedllm.job.loading import load_model
from fedllm.job.party import Party
from fedllm.runs.audit_log import AUDIT_FILE, AuditLog
from fedllm.runs.control import read_object
from fedllm.runs.jsonl import write_json
from fedllm.runtime.flare.door import SOCKETS
from fedllm.runtime.flare.workspace import ENVIRONMENT, write_workspace
from fedllm.runtime.supervise import Supervised, only_one

_LOOK_S = 0.3
Say = Callable[[str], None]


def serve(project_file: Path, *, say: Say) -> None:
    """Keep the server of a project running until this process is told to end.

    Args:
        project_file: The project's file; the coordinator's folder is beside it.
        say: Told what happens, in one line each.

    Raises:
        FedllmError: The kit cannot be used, or the server runs already.
    """
    folder = CoordinatorFolder.beside(project_file.resolve())

    def start() -> tuple[Kit, list[str]]:
        kit = _opened(folder.site)
        open_kit(folder.admin)
        return kit, write_workspace(kit, folder.site / "state" / "flare", admin=folder.admin)

    _keep(folder.site, "the server", start, say, lambda: _server_line(folder.site))


def join(party_file: Path, *, site: Path | None = None, say: Say) -> None:
    """Keep a party's site running until this process is told to end. It only connects; it does not listen.

    Args:
        party_file: The party's file.
        site: The site's folder; by default beside the party's file.
        say: Told what happens, in one line each.

    Raises:
        FedllmError: The kit or the party file cannot be used, or the site runs already.
    """
    party, _ = load_model(Party, party_file, overrides=[])
    folder = (site_folder(party_file, party.name) if site is None else site).resolve()

    def start() -> tuple[Kit, list[str]]:
        kit = _opened(folder)
        if kit.name != party.name:
            fix = "name the party's own file, or install the kit of this party"
            raise ConfigError("PARTY_UNKNOWN", f"the kit is that of `{kit.name}`", where=str(party_file), fix=fix)
        # The job's process reads the party's file from here, and nothing about data from the job.
        write_json(make_private(folder / "state") / "site.json", {"party_file": str(party_file.resolve())})
        return kit, write_workspace(kit, folder / "state" / "flare")

    _keep(folder, f"party {party.name}", start, say, lambda: _party_line(folder))


def _opened(site: Path) -> Kit:
    kit = open_kit(site)
    digest = hashlib.sha256((site / KIT_FOLDER / MANIFEST).read_bytes()).hexdigest()
    AuditLog.open(site / AUDIT_FILE, actor=kit.name).append("kit_opened", digest=digest)
    # What the processes of an earlier start told is not true any more.
    for name in ("clerk.json", "door.json"):
        (site / "state" / name).unlink(missing_ok=True)
    return kit


def _keep(site: Path, what: str, start: Callable[[], tuple[Kit, list[str]]], say: Say, line: Callable[[], str]) -> None:
    state = make_private(site / "state")
    with only_one(state, what=what), TemporaryDirectory(prefix="fedllm-") as sockets:
        kit, command = start()
        process = Supervised(command, state / "engine.log", ENVIRONMENT | os.environ | {SOCKETS: sockets})
        say(f"{what} of project {kit.project}, {kit.host}:{kit.port}, certificate until {kit.expires:%Y-%m-%d}")
        said = ""
        try:
            while True:
                if process.has_ended():
                    say(f"{what}: FLARE's process ended with {process.last_exit}; it is started again")
                    # Whatever was changed in the meantime is found before anything runs on it.
                    start()
                process.keep()
                if (now := line()) != said:
                    said = now
                    say(now)
                time.sleep(_LOOK_S)
        finally:
            process.stop()


def _server_line(site: Path) -> str:
    connected = read_object(site / "state" / "clerk.json").get("connected", [])
    return f"connected: {', '.join(connected) or 'nobody yet'}"


def _party_line(site: Path) -> str:
    door = read_object(site / "state" / "door.json")
    if not door:
        return "connecting to the server"
    return "connected to the server" if door["connected"] else f"no connection to the server since {door['since']}"
