"""fedllm's processes, as `fedllm serve` and `fedllm join` start them: kits, mutual TLS, FLARE's server and clients."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine_baselines.load import Load, Timing, Trial
from engine_baselines.processes import Processes, free_ports

from fedllm.identity.files import CoordinatorFolder
from fedllm.identity.kit import open_kit
from fedllm.job.project import Project
from fedllm.runs.jsonl import write_json
from fedllm.runtime.flare.door import SOCKETS
from fedllm.runtime.flare.workspace import ENVIRONMENT, write_workspace
from fedllm.runtime.provision import provision_all

START_S = 60.0


def rounds_of(load: Load, trial: Trial) -> tuple[Timing, dict[str, Any]]:
    """Return what the rounds took, and all that the server's process noted.

    Args:
        load: What is carried.
        trial: Where.
    """
    sites = {f"site-{number + 1}": trial.folder / f"site-{number + 1}" for number in range(load.parties)}
    address = {"host": "127.0.0.1", "port": free_ports(1)[0]}
    project = Project.model_validate({"name": "bench", "server": address, "parties": list(sites)})
    provision_all(trial.folder / "coordinator", project, sites)
    coordinator = CoordinatorFolder(trial.folder / "coordinator")
    commands = {"server": write_workspace(open_kit(coordinator.site), state(coordinator.site), admin=coordinator.admin)}
    commands |= {name: write_workspace(open_kit(site), state(site)) for name, site in sites.items()}
    for site in (coordinator.site, *sites.values()):
        allow_roles(state(site) / "local" / "resources.json")
    write_json(coordinator.site / "load.json", asdict(load))
    results = coordinator.site / "results.json"
    with Processes(trial.folder, Path(sys.executable).parent) as processes:
        here = str(Path(__file__).resolve().parent.parent)
        sockets = trial.folder / "sockets"
        sockets.mkdir(mode=0o700)
        processes.environment |= {**ENVIRONMENT, SOCKETS: str(sockets)}
        processes.environment["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
        started = [processes.start(name, command) for name, command in commands.items()]
        processes.watch_memory(started[0])
        try:
            timeout_s = START_S + trial.timeout_s
            processes.wait_until(results.exists, process=started[0], name="server", timeout_s=timeout_s)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{(coordinator.site / 'state' / 'log.txt').read_text()[-3000:]}") from None
        found = json.loads(results.read_text())
        return Timing(found["seconds"], *processes.peaks_mb), found


def state(site: Path) -> Path:
    """Return FLARE's workspace at a site.

    Args:
        site: The site's folder.
    """
    return site / "state" / "flare"


def allow_roles(resources: Path) -> None:
    """Let a site's FLARE load the benchmark's roles, which no site of a project does.

    Args:
        resources: The site's `resources.json`.
    """
    text = resources.read_text().replace("fedllm.runtime.flare.clerk.Clerk", "engine_ours.roles.Starter")
    settings = json.loads(text)
    settings["class_allow_list"] = [*settings["class_allow_list"], "engine_ours."]
    write_json(resources, settings)
