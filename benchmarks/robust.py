"""Robust rules: two of ten parties send their update with the sign flipped and a hundred times as long.

Run: python benchmarks/robust.py                        (about 8 minutes on 2 cores)
     python benchmarks/robust.py --concentration 0.5    (parties that are less alike)

The task is the demo's, over ten parties; the base model is a fifth of the demo's, made by the script. Each rule is
compared with the plain mean of ten honest parties, with the same rule for LoRA's factors: loss on the common test set.
NormClipping's limit is the median norm of each round's updates.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import machine
from ten_parties import NAMES, job_folder, job_of, located_parties, small_base

from fedllm.errors import FedllmError
from fedllm.runtime.run import run_local
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.supervised import SupervisedTrainer
from fedllm.wire.payload import Tensors

DISHONEST = NAMES[-2:]
FACTOR = -100.0
ROUNDS, STEPS, LEARNING_RATE, SEED = 8, 10, 0.01, 1
BAR = 0.05
# LoRA rule -> robust rules and their settings.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "FedIT": {
        "NormClipping": {},
        "Krum": {"num_malicious": 2},
        "MultiKrum": {"num_malicious": 2},
        "GeometricMedian": {"num_malicious": 2},
        "FLTrust": {"root_party": NAMES[0]},
    },
    "RoLoRA": {
        "NormClipping": {},
        "Krum": {"num_malicious": 2},
        "Median": {"num_malicious": 2},
        "TrimmedMean": {"num_malicious": 2},
    },
}


class SomeDishonest:
    """Trains as always; then the dishonest ones turn their update around."""

    def __init__(self, dishonest: tuple[str, ...]) -> None:
        self._dishonest, self._honest = dishonest, SupervisedTrainer()

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        """Return the sums of the round.

        Args:
            task: The round's work.
            optimizer: The party's.
        """
        before = {name: tensor.detach().clone() for name, tensor in task.model.trainable.items()}
        sums = self._honest.train(task, optimizer)
        update: Tensors = {name: tensor.detach() - before[name] for name, tensor in task.model.trainable.items()}
        if task.party in self._dishonest:
            with torch.no_grad():
                for name, tensor in task.model.trainable.items():
                    tensor.copy_(before[name] + FACTOR * update[name])
        return sums


def one_run(base: Path, job: dict[str, Any], *, concentration: float | None, dishonest: tuple[str, ...]) -> float:
    """Return the last loss on the common test set, infinite where the run could not go on.

    Args:
        base: The base model's folder.
        job: The job's `federation` settings.
        concentration: How unlike the parties are.
        dishonest: Who is.
    """
    trainer = SomeDishonest(dishonest)
    federation = {"num_rounds": ROUNDS, "eval_every": ROUNDS} | job
    train = {"local_steps": STEPS, "learning_rate": LEARNING_RATE}
    with tempfile.TemporaryDirectory() as temporary:
        folder = job_folder(Path(temporary) / "job", SEED, concentration=concentration)
        plan = job_of(folder, base, seed=SEED, federation=federation, train=train)
        try:
            run = run_local(plan, parties=located_parties(folder), output=Path(temporary) / "run", trainer=trainer)
        except FedllmError as error:
            print(f"  stopped: {error.code}, {error.what}", flush=True)
            return math.inf
        found = [row for row in run.rows() if (row["name"], row["split"]) == ("loss_nats", "common")]
    return float(found[-1]["value"])


def rows(base: Path, concentration: float | None) -> bool:
    """Print the table and return whether each rule kept the bar while the mean did not.

    Args:
        base: The base model's folder.
        concentration: How unlike the parties are.
    """
    kept = True
    print(
        "| LoRA rule | rule | honest parties only | 2 of 10 dishonest | against the clean mean |\n|---|---|---|---|---|"
    )
    for lora_rule, rules in CASES.items():
        plain = {"lora_rule": lora_rule}
        clean = one_run(base, plain, concentration=concentration, dishonest=())
        bad = one_run(base, plain, concentration=concentration, dishonest=DISHONEST)
        kept &= line(lora_rule, "mean", clean, bad, clean) > BAR
        for name, values in rules.items():
            settings = {"name": name} | values
            found = [
                one_run(base, plain | {"robust": settings}, concentration=concentration, dishonest=who)
                for who in ((), DISHONEST)
            ]
            kept &= line(lora_rule, name, *found, clean) <= BAR
    return kept


def line(lora_rule: str, name: str, quiet: float, attacked: float, clean: float) -> float:
    """Print a line of the table and return how far above the clean loss the attacked one is.

    Args:
        lora_rule: The rule for LoRA's factors.
        name: The robust rule.
        quiet: Its loss among honest parties.
        attacked: Its loss with dishonest ones.
        clean: The loss of the mean of honest parties.
    """
    off = attacked / clean - 1
    words = f"{off:+.1%}" if math.isfinite(off) else "diverged"
    print(f"| {lora_rule} | {name} | {quiet:.4f} ({quiet / clean - 1:+.1%}) | {attacked:.4f} | {words} |", flush=True)
    return off


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concentration", type=float, help="of the Dirichlet distribution; without it all are alike")
    parser.add_argument("--base", type=Path, help="folder of a base model that was made before")
    args = parser.parse_args()
    print(f"{machine()}; {ROUNDS} rounds of {STEPS} steps, seed {SEED}\n")
    with tempfile.TemporaryDirectory() as temporary:
        kept = rows(small_base(args.base or Path(temporary) / "base"), args.concentration)
    print(f"\neach rule within {BAR:.0%} of the clean mean, the mean not: {'yes' if kept else 'NO'}")


if __name__ == "__main__":
    main()
