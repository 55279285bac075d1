"""Peak memory of a run with 2, 8 and 32 parties in one process: one base model, whatever the number of parties.

Run: python benchmarks/memory.py   (about 1 minute on 2 cores)
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine, make_job, random_base, write_parties

from fedllm.models.adapter import skeleton
from fedllm.runtime.run import run_local

COUNTS = (2, 8, 32)
PEFT = {"r": 64, "lora_alpha": 64}


def one_run(base: Path, folder: Path, count: int) -> None:
    """Run a job with so many parties and print the process's peak memory in bytes.

    Args:
        base: The base model's folder.
        folder: Where data and run go.
        count: Number of parties.
    """
    names = [f"party-{number:02d}" for number in range(count)]
    parties = write_parties(folder / "data", names=names, examples=8, words=8)
    train = {"local_steps": 1, "per_device_train_batch_size": 4, "optimizer_state": "keep"}
    job = make_job(base, names, federation={"num_rounds": 2}, train=train, peft=PEFT, runtime={"num_threads": 1})
    run_local(job, parties=parties, output=folder / "run")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    """Measure each number of parties in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("BASE", "FOLDER", "COUNT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one_run(Path(args.one[0]), Path(args.one[1]), int(args.one[2]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        base = random_base(Path(temporary) / "base", hidden=512, layers=4)
        job = make_job(base, ["a", "b"], federation={"num_rounds": 1}, train={"local_steps": 1}, peft=PEFT)
        adapter = sum(spec.num_bytes for spec in skeleton(base, job.peft).manifest.values())
        peaks = {count: peak_of(base, Path(temporary) / str(count), count) for count in COUNTS}
    report(peaks, adapter)


def peak_of(base: Path, folder: Path, count: int) -> int:
    """Return the peak memory of a run in a fresh process, in bytes.

    Args:
        base: The base model's folder.
        folder: Where data and run go.
        count: Number of parties.
    """
    command = [sys.executable, __file__, "--one", str(base), str(folder), str(count)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def report(peaks: dict[int, int], adapter: int) -> None:
    """Print the table.

    Args:
        peaks: Bytes by number of parties.
        adapter: Bytes of one adapter.
    """
    optimizer = 2 * adapter
    bound = 3 * adapter + optimizer
    fewest, most = min(peaks), max(peaks)
    slope = (peaks[most] - peaks[fewest]) / (most - fewest)
    print(machine())
    print(f"adapter {adapter / 1e6:.1f} MB, AdamW state {optimizer / 1e6:.1f} MB a party, bound {bound / 1e6:.1f} MB")
    for count, peak in peaks.items():
        print(f"{count:>3} parties: peak {peak / 1e6:8.1f} MB")
    print(f"growth: {slope / 1e6:.1f} MB a party = {slope / adapter:.2f} adapters ({slope / bound:.2f} of the bound)")


if __name__ == "__main__":
    main()
