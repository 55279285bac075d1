"""kill -9 at random moments of a 5-round run, `fedllm resume` each time: the same adapter, no round counted twice.

Run: python benchmarks/resume.py   (20 kills, about 10 minutes on 2 cores)
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import machine

from fedllm.runs.jsonl import read_rows
from fedllm.runtime.scaffold import write_job_folder

ROUNDS = 5
SETTINGS = [
    f"federation.num_rounds={ROUNDS}",
    "federation.keep=last",
    "federation.fraction_train=0.7",
    "peft.lora_dropout=0.1",
    "train.local_steps=3",
    "evaluate.max_examples=16",
    "runtime.num_threads=1",
]


@dataclass(frozen=True)
class Trial:
    """One kill and what came of it."""

    after_s: float
    stood_at: str
    is_same: bool
    counted_once: bool
    resumed_s: float


def command(job: Path, run: Path, *, workers: int) -> list[str]:
    """Return the command that starts the run, or goes on with it where it can be resumed.

    Args:
        job: The job file.
        run: The run folder.
        workers: Worker processes.
    """
    fedllm = [sys.executable, "-m", "fedllm"]
    options = ["--quiet", "--workers", str(workers)]
    if (run / "local.json").exists():
        return [*fedllm, "resume", str(run), *options]
    return [*fedllm, "run", str(job), "--output", str(run), *options, *(f"--set={text}" for text in SETTINGS)]


def journal(run: Path) -> list[tuple[int, str]]:
    """Return the (round, step) pairs of a run's journal.

    Args:
        run: The run folder.
    """
    return [(row["round"], row["step"]) for row in read_rows(run / "journal.jsonl")]


def counted_once(run: Path) -> bool:
    """Return whether each round was committed once and no metric stands twice.

    Args:
        run: The run folder.
    """
    commits = [number for number, step in journal(run) if step == "commit"]
    files = [run / "metrics.jsonl", *run.glob("parties/*/metrics.jsonl")]
    keys = Counter(
        (path.name, path.parent.name, row["round"], row["party"], row["split"], row["name"])
        for path in files
        for row in read_rows(path)
    )
    return commits == list(range(ROUNDS + 1)) and max(keys.values()) == 1


def sha256(run: Path) -> str:
    """Return the digest of the delivered adapter.

    Args:
        run: The run folder.
    """
    return str(json.loads((run / "result.json").read_text(encoding="utf-8"))["adapter_sha256"])


def finish(job: Path, run: Path, *, workers: int) -> float:
    """Go on with a run to its end and return the seconds until it was at work again.

    Args:
        job: The job file.
        run: The run folder.
        workers: Worker processes.
    """
    before, started, resumed = len(journal(run)), time.monotonic(), 0.0
    process = subprocess.Popen(command(job, run, workers=workers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if not resumed and len(journal(run)) > before:
            resumed = time.monotonic() - started
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"resume ended with exit code {process.returncode}")
    return resumed or time.monotonic() - started


def trial(job: Path, run: Path, *, after_s: float, workers: int, expected: str) -> Trial | None:
    """Return what one kill did, or None if the run was done before it.

    Args:
        job: The job file.
        run: A new run folder.
        after_s: When to kill, in seconds after the start.
        workers: Worker processes.
        expected: The undisturbed adapter's digest.
    """
    process = subprocess.Popen(command(job, run, workers=workers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(after_s)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return None
    steps = journal(run)
    stood_at = f"round {steps[-1][0]}, {steps[-1][1]}" if steps else "before round 0"
    resumed_s = finish(job, run, workers=workers)
    return Trial(after_s, stood_at, sha256(run) == expected, counted_once(run), resumed_s)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="How many kills.")
    parser.add_argument("--workers", type=int, default=0, help="Worker processes of each run.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        job = write_job_folder(Path(folder) / "job")
        started = time.monotonic()
        finish(job, Path(folder) / "unbroken", workers=options.workers)
        usual_s = time.monotonic() - started
        expected = sha256(Path(folder) / "unbroken")
        print(f"undisturbed: {usual_s:.1f} s, adapter {expected[:16]}\n")
        print("| kill | after s | stood at | same SHA-256 | counted once | s to resume |\n|---|---|---|---|---|---|")
        draw, trials = random.Random(options.seed), list[Trial]()
        while len(trials) < options.kills:
            run = Path(folder) / f"run{draw.getrandbits(32):08x}"
            # The first seconds are imports, where there is nothing to lose: most moments lie after them.
            after_s = draw.uniform(0.2, 1.0) * usual_s
            if found := trial(job, run, after_s=after_s, workers=options.workers, expected=expected):
                trials.append(found)
                marks = ["yes" if ok else "NO" for ok in (found.is_same, found.counted_once)]
                print(f"| {len(trials)} | {after_s:.1f} | {found.stood_at} | {marks[0]} | {marks[1]} "
                      f"| {found.resumed_s:.1f} |", flush=True)  # fmt: skip
    same = sum(found.is_same and found.counted_once for found in trials)
    slowest = max(found.resumed_s for found in trials)
    print(f"\n{same} of {len(trials)} as undisturbed; slowest resume {slowest:.1f} s")
    sys.exit(same < len(trials))


if __name__ == "__main__":
    main()
