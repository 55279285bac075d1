"""NVIDIA FLARE, deployed as in production on loopback: provisioned, mutual TLS, a process for each site and job."""

from __future__ import annotations

import json
import re
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import psutil

from engine_baselines.environments import python_of
from engine_baselines.load import Load, Timing, Trial
from engine_baselines.processes import Processes, free_ports

JOBS = Path(__file__).parent / "flare_job"
PROJECT = "bench"
ADMIN = "admin@bench.org"
SECURITY = "mutual TLS"
START_S = 60
# What the controller of FLARE's FedAvg writes, each with the time at which it did, the text framed by two rules.
ROUND = re.compile(r"^(\S+ \S+) - FedAvg - .*\n[-=]+\n +(?:Round \d+ started|Finished FedAvg)\.", re.MULTILINE)


def fedavg_recipe(load: Load, trial: Trial) -> Timing:
    """Return what a run of FLARE's FedAvg recipe for PyTorch takes, with the recipe's own defaults.

    Args:
        load: What is carried.
        trial: Where.
    """
    with _processes(trial) as processes:
        server = _deploy(processes, load.parties)
        processes.watch_memory(server)
        _submit(processes, "fedavg", load, timeout_s=trial.timeout_s)
        log = processes.log("server").read_text(errors="replace")
        rounds_s = _rounds(log)
        complete = log.count(f"Aggregated {load.parties}/{load.parties} results")
        if not len(rounds_s) == complete == load.rounds:
            raise RuntimeError(f"{complete} of {len(rounds_s)} rounds were complete:\n{processes.tail('server')}")
        return Timing(rounds_s, *processes.peaks_mb)


def bare_calls(load: Load, trial: Trial) -> tuple[Timing, Timing]:
    """Return the seconds of calls, bytes there and back, to all parties at once: by FLARE's Cell and by its Collab.

    Args:
        load: How many are called with how many bytes, and how often, a call for warm-up included.
        trial: Where.
    """
    with _processes(trial) as processes:
        _deploy(processes, load.parties)
        results = [_submit(processes, kind, load, timeout_s=trial.timeout_s) for kind in ("cell", "collab")]
        cell, collab = (Timing(json.loads(path.read_text())) for path in results)
        return cell, collab


def _processes(trial: Trial) -> Processes:
    return Processes(trial.folder, python_of(trial.environments, "flare").parent)


def _deploy(processes: Processes, parties: int) -> psutil.Popen:
    """Return the server's process, once it and the parties' have been started.

    Args:
        processes: Where they run.
        parties: How many.
    """
    kits = _provision(processes, parties)
    names = ["localhost", *_sites(parties)]
    # With --once a kit starts the engine without the loop that restarts it.
    started = [
        processes.start(_label(name), ["bash", kits / name / "startup/sub_start.sh", "--once"]) for name in names
    ]
    return started[0]


def _label(name: str) -> str:
    return "server" if name == "localhost" else name


def _sites(parties: int) -> list[str]:
    return [f"site-{number + 1}" for number in range(parties)]


def _provision(processes: Processes, parties: int) -> Path:
    """Return the folder of the start-up kits, with stores of jobs that are the trial's own.

    Args:
        processes: The trial.
        parties: How many sites.
    """
    project = processes.folder / "project.json"
    project.write_text(json.dumps(_project(parties, *free_ports(2))))
    workspace = processes.folder / "workspace"
    processes.run("provision", ["nvflare", "provision", "-p", project, "-w", workspace], timeout_s=START_S)
    kits = workspace / PROJECT / "prod_00"
    local = kits / "localhost" / "local"
    settings = (local / "resources.json.default").read_text()
    assert "/tmp/nvflare" in settings  # noqa: S108
    (local / "resources.json").write_text(settings.replace("/tmp/nvflare", str(processes.folder / "stores")))  # noqa: S108
    return kits


def _project(parties: int, port: int, admin_port: int) -> dict[str, object]:
    """Return the project to provision, as JSON is YAML: FLARE's own builders with their defaults."""
    server = {"name": "localhost", "type": "server", "org": PROJECT, "fed_learn_port": port, "admin_port": admin_port}
    sites = [{"name": name, "type": "client", "org": PROJECT} for name in _sites(parties)]
    admin = {"name": ADMIN, "type": "admin", "org": PROJECT, "role": "project_admin"}
    lighter = "nvflare.lighter.impl"
    builders = [
        {"path": f"{lighter}.workspace.WorkspaceBuilder"},
        {"path": f"{lighter}.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
        {"path": f"{lighter}.cert.CertBuilder"},
        {"path": f"{lighter}.signature.SignatureBuilder"},
    ]
    participants = [server, *sites, admin]
    return {"api_version": 3, "name": PROJECT, "participants": participants, "builders": builders}


def _submit(processes: Processes, kind: str, load: Load, *, timeout_s: float) -> Path:
    """Return the file for the job's results, once the job has finished.

    Args:
        processes: The trial.
        kind: The job.
        load: What is carried.
        timeout_s: Seconds at most.
    """
    results = processes.folder / f"{kind}.json"
    request = {
        "kind": kind,
        "kit": str(processes.folder / "workspace" / PROJECT / "prod_00" / ADMIN),
        "user": ADMIN,
        "results": str(results),
        "parties": load.parties,
        "rounds": load.rounds,
        "tensors": load.tensors,
        "values": load.values,
    }
    # In a copy, since a job's code is packed from where it stands.
    code = [path for path in JOBS.iterdir() if path.suffix == ".py"]
    for path in code:
        (processes.folder / path.name).write_bytes(path.read_bytes())
    command = ["python", "submit.py", json.dumps(request)]
    processes.run(f"submit-{kind}", command, timeout_s=START_S + timeout_s)
    return results


def _rounds(log: str) -> list[float]:
    """Return the seconds of each round: from its start to the next one's, or to the end.

    Args:
        log: The server's output.
    """
    times = [datetime.strptime(text, "%Y-%m-%d %H:%M:%S,%f") for text in ROUND.findall(log)]
    return [(end - start).total_seconds() for start, end in pairwise(times)]
