"""A federation as real processes on loopback: start `fedllm up`, look at its processes, end one, wait for the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# For how long a test waits for one thing. It is there so that nothing hangs: ten processes that load torch on two busy
# cores take minutes for what takes seconds elsewhere.
PATIENCE_S = 240.0

# What tells FLARE's processes from each other; PARTY is put in.
SIGNS = {
    "server parent": ("server_train",),
    "server job": ("runner_process",),
    "client parent": ("client_train", "uid=PARTY"),
    "client job": ("worker_process", "-c PARTY"),
}


@dataclass
class Deployed:
    """`fedllm up` at work."""

    root: Path
    process: subprocess.Popen[bytes]

    @property
    def run(self) -> Path:
        """The run folder at the coordinator; it appears after a moment."""
        found = list(self.root.glob("coordinator/site/state/runs/*/run.json"))
        return found[0].parent if found else self.root / "not-yet"

    def journal(self) -> list[tuple[int, str]]:
        path = self.run / "journal.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(row["round"], row["step"]) for row in map(json.loads, lines)]

    def verdict(self) -> dict[str, Any]:
        path = self.run / "result.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def processes(self) -> list[psutil.Process]:
        """Return every process that works in the deployment's folder."""
        return [item for item in psutil.process_iter() if str(self.root) in _command(item)]

    def find(self, what: str, *, party: str = "north") -> psutil.Process:
        signs = [sign.replace("PARTY", party) for sign in SIGNS[what]]
        found = [item for item in self.processes() if all(sign in _command(item) for sign in signs)]
        assert len(found) == 1, f"{what}: {found}"
        return found[0]

    def kill(self, what: str, *, party: str = "north") -> None:
        os.kill(self.find(what, party=party).pid, signal.SIGKILL)

    def wait_for(self, happened: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not happened():
            assert time.monotonic() < until, self.logs()
            assert self.process.poll() is None or happened(), self.logs()
            time.sleep(0.02)

    def end(self) -> int:
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.logs()) from None

    def logs(self) -> str:
        """Return the ends of all logs, for the message of a test that fails."""
        paths = [*self.root.glob("*.log"), *self.root.glob("*/state/*.log"), *self.root.glob("*/site/state/*.log")]
        paths += [*self.root.glob("*/state/log.txt"), *self.root.glob("*/site/state/log.txt")]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(paths))


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@contextmanager
def deployed(
    job_file: Path, root: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Deployed]:
    """Start `fedllm up` for a job; whatever is left of it at the end is killed by its id.

    Args:
        job_file: The job.
        root: The folder of keys and states.
        options: More options of the command.
        environment: More of the processes' environment.
    """
    root.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "fedllm", "up", str(job_file), "--output", str(root), *options]
    with (root / "up.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
        )
    made = Deployed(root, process)
    try:
        yield made
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
        for left in made.processes():
            left.kill()
