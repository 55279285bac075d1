"""From `fedllm up` to the end of round one, on the job that `fedllm init` writes: three parties, real processes.

Run: python benchmarks/up.py                 (about 2 minutes on 2 cores)
     python benchmarks/up.py --repeats 5

What loading the model costs is measured beside it: as many processes as there are parties load it at the same time, as
the parties' processes do, with transformers and PEFT imported.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "runtime" / "flare"))

from deployed import deployed

from fedllm.job.job import Job
from fedllm.runtime.scaffold import write_job_folder

BAR_S = 20.0
_LOAD = """
import sys
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1])
get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), LoraConfig(task_type="CAUSAL_LM"))
"""


def first_round_s(job_file: Path, root: Path) -> float:
    """Return the seconds from the command until round one is committed.

    Args:
        job_file: The job.
        root: Where keys and states go.
    """
    started = time.monotonic()
    with deployed(job_file, root, "--quiet") as up:
        up.wait_for(lambda: (1, "commit") in up.journal(), seconds=120)
        return time.monotonic() - started


def load_s(base: Path, parties: int) -> float:
    """Return the seconds until as many processes as there are parties have loaded the model.

    Args:
        base: The base model.
        parties: How many.
    """
    started = time.monotonic()
    loading = [
        subprocess.Popen([sys.executable, "-c", _LOAD, str(base)], stderr=subprocess.DEVNULL) for _ in range(parties)
    ]
    if any(process.wait() for process in loading):
        raise RuntimeError("the model could not be loaded")
    return time.monotonic() - started


def main() -> None:
    """Print both and their difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print(machine())
    rounds, loads = [], []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        job_file = write_job_folder(Path(scratch) / "job")
        job = Job.from_yaml(job_file)
        base = job.base_dir / job.model.model_name_or_path
        for number in range(repeats):
            loads.append(load_s(base, len(job.parties)))
            rounds.append(first_round_s(job_file, Path(scratch) / f"up-{number}"))
            print(f"round one after {rounds[-1]:.1f} s, loading alone {loads[-1]:.1f} s", flush=True)
    rest = statistics.median(rounds) - statistics.median(loads)
    print(f"median: {rest:.1f} s besides loading the model; the aim is {BAR_S:.0f} s")
    sys.exit(rest > BAR_S)


if __name__ == "__main__":
    main()
