"""What a server reads of the demo's parties from their updates, and what stops it.

Run: python benchmarks/attacks.py     (about a minute on 2 cores)

The demo's base model and data: 1024 words, hidden size 128. Updates are those of real runs, as the server gets them.
The span test ranks the words that any party has in its training data, so that knowing which words are common is of no
help. *Found* is the share of the words that a party's model read in the round which are among as many words ranked
first, *AUC* the chance that one of them is ranked before another word. Words drawn at random have the share *by
chance*, and an AUC of 0.5.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine

from fedllm.job.job import Job
from fedllm.privacy.inversion import first_inputs, span_test
from fedllm.runtime.opening import trainer_for
from fedllm.runtime.overheard import rows_of, words_read
from fedllm.runtime.run import run_local
from fedllm.runtime.scaffold import write_job_folder
from fedllm.train.base import TrainSums, TrainTask
from fedllm.wire.payload import Tensors

ROUNDS = 3
SGD = {"train.optim": "sgd", "train.learning_rate": 0.1}
NOISE = {"unit": "example", "epsilon": 8.0, "accountant": "RDP"}
# What -> (settings of the job, the round that is attacked)
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "SGD, 1 step of 1 example, round 1": (SGD, 1),
    "SGD, 1 step of 1 example": (SGD, ROUNDS),
    "SGD, 1 step of 4": (SGD | {"train.per_device_train_batch_size": 4}, ROUNDS),
    "SGD, 10 steps of 4": (SGD | {"train.per_device_train_batch_size": 4, "train.local_steps": 10}, ROUNDS),
    "SGD, 10 steps of 4, all parameters": (
        SGD | {"train.per_device_train_batch_size": 4, "train.local_steps": 10, "peft": {"peft_type": "FULL"}},
        ROUNDS,
    ),
    "AdamW, 1 step of 1 example": ({}, ROUNDS),
    "AdamW, 10 steps of 4": ({"train.per_device_train_batch_size": 4, "train.local_steps": 10}, ROUNDS),
    "SGD, 1 step of 1 example, epsilon 8": (SGD | {"privacy.differential_privacy": NOISE}, ROUNDS),
    "AdamW, 10 steps of 4, epsilon 8": (
        {
            "train.per_device_train_batch_size": 4,
            "train.local_steps": 10,
            "privacy.differential_privacy": NOISE,
        },
        ROUNDS,
    ),
}


@dataclass(frozen=True)
class Seen:
    """A party's update of one round, what it started from, and the words that its model read."""

    start: Tensors
    update: Tensors
    words: set[int]


class Spy:
    """Trains as the job says, and notes what the server will see."""

    is_private = True

    def __init__(self, job: Job, number: int) -> None:
        self._trainer, self._number = trainer_for(job), number
        self.seen: dict[str, Seen] = {}
        self.model: Any = None
        self.pool = set[int]()

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        """Return the sums of the round."""
        start = task.model.read()
        sums = self._trainer.train(task, optimizer)
        if task.round == self._number:
            end = task.model.read()
            update = {name: end[name] - start[name] for name in end}
            self.seen[task.party] = Seen(start, update, words_read(rows_of(task)))
            self.model = task.model.model
            self.pool |= words_read(task.examples)
        return sums


def attacked(folder: Path, changes: dict[str, Any], number: int) -> Spy:
    """Return what was seen in a run of the demo's job with these changes."""
    plain = {"federation.num_rounds": number, "train.local_steps": 1, "train.per_device_train_batch_size": 1}
    plain |= {"train.warmup_steps": 0, "train.lr_scheduler_type": "constant", "federation.weight_by": "equal"}
    plain |= {"evaluate.max_examples": 4, "federation.eval_every": number}
    job = Job.from_yaml(folder / "job.yaml", overrides=[f"{k}={_yaml(v)}" for k, v in (plain | changes).items()])
    spy = Spy(job, number)
    run_local(job, output=Path(tempfile.mkdtemp(dir=folder)) / "run", trainer=spy)
    return spy


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    return "null" if value is None else str(value)


def scores(spy: Spy, seen: Seen, update: Tensors) -> list[float]:
    """Return the share of words by chance, the share found, and the AUC."""
    pool = sorted(spy.pool)
    told = span_test(first_inputs(spy.model, pool), update, seen.start, there=[word in seen.words for word in pool])
    return [told.by_chance, told.found, told.ranked.auc] if told else [1.0, 1.0, 0.5]


def row(title: str, spy: Spy) -> str:
    """Return a line of the table: means over the parties, and the sum of them all."""
    parties = [seen for seen in spy.seen.values() if seen.words]
    alone = [scores(spy, seen, seen.update) for seen in parties]
    mean = {key: sum(seen.update[key] for seen in parties) / len(parties) for key in parties[0].update}
    everyone = Seen(parties[0].start, mean, set().union(*(seen.words for seen in parties)))
    words = sum(len(seen.words) for seen in parties) / len(parties)
    values = [*(sum(each) / len(alone) for each in zip(*alone, strict=True)), *scores(spy, everyone, mean)]
    return f"| {title} | {words:.0f} of {len(spy.pool)} | " + " | ".join(f"{value:.2f}" for value in values) + " |"


def main() -> None:
    """Print the table."""
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = write_job_folder(Path(name) / "job").parent
        print("| update | words read | by chance | found | AUC | in the sum of three: by chance | found | AUC |")
        print("| --- | --: | --: | --: | --: | --: | --: | --: |")
        for title, (changes, number) in CASES.items():
            print(row(title, attacked(folder, changes, number)), flush=True)


if __name__ == "__main__":
    main()
