"""kill -9 of each process of a run between machines at 8 moments each: it ends by itself with the same adapter.

Run: python benchmarks/recovery.py                       (32 kills, about 25 minutes on 2 cores)
     python benchmarks/recovery.py --kills 8             (every fourth of them)

Server and parties are real processes on loopback with mutual TLS, as after `fedllm up`. "Goes on after" is the time
from the kill until the run was resumed and wrote the next line of its journal: detection, new processes, loading of the
model, handshake. It is missing where the run ended without being resumed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "runtime" / "flare"))

from deployed import SIGNS, Deployed, deployed

from fedllm.runtime.scaffold import write_job_folder

ROUNDS = 4
SETTINGS = [
    f"federation.num_rounds={ROUNDS}",
    "federation.keep=last",
    "peft.lora_dropout=0.1",
    "train.local_steps=12",
    "evaluate.max_examples=16",
    "runtime.num_threads=1",
]
OPTIONS = [f"--set={text}" for text in SETTINGS]
_TRIAL_S = 240.0


def begun(number: int) -> Callable[[Deployed], bool]:
    """Return whether a round has begun."""
    return lambda up: (number, "begin") in up.journal()


def committed(number: int) -> Callable[[Deployed], bool]:
    """Return whether a round is committed."""
    return lambda up: (number, "commit") in up.journal()


def stage(name: str) -> Callable[[Deployed], bool]:
    """Return whether a party says that it is at a stage."""

    def look(up: Deployed) -> bool:
        path = up.run / "live.json"
        try:
            told = json.loads(path.read_text())
        except (OSError, ValueError):
            return False
        return any(seen["stage"] == name for seen in told["parties"].values())

    return look


# Name of the moment, what must have happened, and how long after that, in seconds.
MOMENTS: list[tuple[str, Callable[[Deployed], bool], float]] = [
    ("parties load the model", stage("loading"), 0.0),
    ("round 0 begins", begun(0), 0.0),
    ("round 1 begins", begun(1), 0.0),
    ("in the midst of round 2's steps", begun(2), 0.5),
    ("late in round 2", begun(2), 1.2),
    ("round 2 is committed", committed(2), 0.0),
    ("in the midst of round 3's steps", begun(3), 0.7),
    ("the last round is committed", committed(ROUNDS), 0.0),
]


@dataclass(frozen=True)
class Trial:
    """One kill and what came of it."""

    what: str
    moment: str
    goes_on_s: float | None
    is_same: bool
    counted_once: bool


def kill_once(job: Path, root: Path, what: str, moment: int, expected: str) -> Trial:
    """Return what came of one kill.

    Args:
        job: The job file.
        root: Where keys and states go.
        what: Which process.
        moment: Index of the moment.
        expected: The undisturbed run's adapter.
    """
    name, happened, delay = MOMENTS[moment]
    with deployed(job, root, "--quiet", *OPTIONS) as up:
        up.wait_for(lambda: happened(up), seconds=_TRIAL_S)
        time.sleep(delay)
        up.kill(what)
        killed, before = time.monotonic(), taken_up(up)
        up.wait_for(lambda: taken_up(up) > before or up.process.poll() is not None, seconds=_TRIAL_S)
        goes_on = None
        if taken_up(up) > before:
            lines = len(up.journal())
            up.wait_for(lambda: len(up.journal()) > lines or up.process.poll() is not None, seconds=_TRIAL_S)
            goes_on = time.monotonic() - killed
        up.end(seconds=_TRIAL_S)
        commits = [number for number, step in up.journal() if step == "commit"]
        is_same = up.verdict().get("adapter_sha256") == expected
        return Trial(what, name, goes_on, is_same, commits == list(range(ROUNDS + 1)))


def taken_up(up: Deployed) -> int:
    """Return the number of the present start of the run at the server; each has a higher one."""
    path = up.run / "epoch.json"
    return int(json.loads(path.read_text())["epoch"]) if path.exists() else 0


def undisturbed(job: Path, run: Path) -> str:
    """Return the adapter's SHA-256 of a run in one process.

    Args:
        job: The job file.
        run: Its folder.
    """
    command = [sys.executable, "-m", "fedllm", "run", str(job), "--output", str(run), "--quiet", *OPTIONS]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(json.loads((run / "result.json").read_text())["adapter_sha256"])


def main() -> None:
    """Print one line per kill, and the worst time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=len(SIGNS) * len(MOMENTS), help="how many, spread evenly")
    kills = parser.parse_args().kills
    print(machine())
    every = [(what, moment) for moment in range(len(MOMENTS)) for what in SIGNS]
    chosen = (
        [every[(index * len(every) // kills + index) % len(every)] for index in range(kills)]
        if kills < len(every)
        else every
    )
    trials = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        job = write_job_folder(root / "job")
        expected = undisturbed(job, root / "undisturbed")
        print("| process | when | goes on after, s | same SHA-256 | counted once |\n|---|---|---|---|---|")
        for index, (what, moment) in enumerate(chosen):
            trial = kill_once(job, root / f"up-{index}", what, moment, expected)
            trials.append(trial)
            after = "-" if trial.goes_on_s is None else f"{trial.goes_on_s:.1f}"
            same, once = ("yes" if fact else "NO" for fact in (trial.is_same, trial.counted_once))
            print(f"| {trial.what} | {trial.moment} | {after} | {same} | {once} |", flush=True)
    good = sum(trial.is_same and trial.counted_once for trial in trials)
    slowest = max((trial.goes_on_s or 0.0 for trial in trials), default=0.0)
    print(f"\n{good} of {len(trials)} as undisturbed; the slowest went on after {slowest:.1f} s")


if __name__ == "__main__":
    main()
