"""Flower, deployed on loopback: a superlink and a supernode for each party, without TLS."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from engine_baselines.environments import python_of
from engine_baselines.load import Load, Timing, Trial
from engine_baselines.processes import Processes, free_ports, is_listening

APP = Path(__file__).parent / "flower_app"
SECURITY = "none"
START_S = 60


def fedavg(load: Load, trial: Trial, *, evaluated: bool) -> Timing:
    """Return what a run of Flower's FedAvg takes.

    Args:
        load: What is carried.
        trial: Where.
        evaluated: Whether each round also sends the new model out to be evaluated, as is Flower's default.
    """
    results = trial.folder / "ends.txt"
    with Processes(trial.folder, python_of(trial.environments, "flower").parent) as processes:
        # No telemetry, no look for updates, nothing written outside the folder.
        processes.environment |= {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_HOME": str(trial.folder / "home"),
        }
        _deploy(processes, load.parties)
        config = {
            "parties": load.parties,
            "rounds": load.rounds,
            "tensors": load.tensors,
            "values": load.values,
            "fraction-evaluate": 1.0 if evaluated else 0.0,
            "results": f"'{results}'",
        }
        settings = " ".join(f"{key}={value}" for key, value in config.items())
        run = processes.start("run", ["flwr", "run", APP, "bench", "--stream", "--run-config", settings])
        processes.wait_until(
            lambda: _is_right(results),
            process=run, name="run", timeout_s=START_S + trial.timeout_s,
        )  # fmt: skip
        return Timing([end - start for start, end in pairwise(_times(results))], *processes.peaks_mb)


def _deploy(processes: Processes, parties: int) -> None:
    """Start the superlink and the supernodes, the former's memory watched.

    Args:
        processes: The trial.
        parties: How many supernodes.
    """
    port, *node_ports = free_ports(1 + parties)
    address = f"127.0.0.1:{port}"
    config = processes.folder / "home" / "config.toml"
    config.write_text(f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "{address}"\ninsecure = true\n')
    options = ["--insecure", "--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", str(port)]
    superlink = processes.start("superlink", ["flower-superlink", *options])
    processes.watch_memory(superlink)
    processes.wait_until(lambda: is_listening(port), process=superlink, name="superlink", timeout_s=START_S)
    for number, node_port in enumerate(node_ports):
        options = ["--insecure", "--superlink", address, "--host", "127.0.0.1", "--port", str(node_port)]
        processes.start(f"supernode-{number}", ["flower-supernode", *options, "--node-config", f"party={number + 1}"])


def _is_right(results: Path) -> bool:
    """Return whether all rounds have ended with the right mean."""
    return results.exists() and results.read_text().endswith("right\n")


def _times(results: Path) -> list[float]:
    """Return the times at which the rounds ended; the first one is the start of the first."""
    return [float(line) for line in results.read_text().splitlines()[:-1]]
