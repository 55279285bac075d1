"""What differential privacy costs: the demo's task at several epsilons over several seeds, and the time of a step.

Quality: ROUGE-L and loss on the common test set, without noise and with epsilon 8, 3 and 1 per example at delta 1e-5.
Time: a step of the plain trainer, and of each way to the gradients of single examples, opacus' hooks among them where
it is installed (`pip install opacus`).
Run: python benchmarks/dp.py      (the whole table; `--rounds`, `--seeds` and `--epsilons` for a part of it)
     python benchmarks/dp.py --only time
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from common import machine, random_base
from quality import job_folder

from fedllm import run_local
from fedllm.data.adverts import AdvertTask
from fedllm.data.batches import collate
from fedllm.data.tokens import TokenisedExample
from fedllm.job.job import load_parties
from fedllm.models.adapter import TunableModel
from fedllm.models.load import load_base
from fedllm.models.loss import target_losses
from fedllm.models.settings import ModelSettings, PeftSettings
from fedllm.runtime.judge import final_tensors, judge, test_set
from fedllm.runtime.site import common_examples, open_site
from fedllm.train.per_example import at_once, one_by_one
from fedllm.train.private import clipped_sum

# Large batches and few steps: what each example adds is drowned by less noise. The same without noise.
SETTINGS: dict[str, Any] = {
    "federation.eval_every": 5,
    "train.local_steps": 4,
    "train.per_device_train_batch_size": 32,
    "train.gradient_accumulation_steps": 4,
    "evaluate.max_examples": 160,
}
DELTA = 1e-5


def quality(seed: int, epsilon: float | None, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of one federated run.

    Args:
        seed: Of the task and of the run.
        epsilon: Per example; None for no noise.
        folder: Where its files go.
        settings: Dotted job settings.
    """
    asked = {} if epsilon is None else {"unit": "example", "epsilon": epsilon, "delta": DELTA}
    own = {f"privacy.differential_privacy.{key}": value for key, value in asked.items()}
    job = job_folder(folder, AdvertTask(seed=seed), {**settings, **own})
    parties = load_parties(job)
    result = run_local(job, parties=parties, output=folder / "run")
    site = open_site(job, parties)
    scores = judge(site, test_set(site, common_examples(job)), final_tensors(result.path, job))
    spent = [row["value"] for row in result.rows() if row["name"] == "epsilon_spent"]
    noise = [row["value"] for row in result.rows() if row["name"] == "noise_multiplier"]
    row = {"seed": seed, "epsilon": epsilon, "rougeL": scores["rougeL"], "loss_nats": scores["loss_nats"]}
    return row | {"spent": max(spent, default=None), "noise": max(noise, default=None)}


def quality_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the quality table, printing them.

    Args:
        options: Seeds, epsilons and rounds.
    """
    rows = []
    settings = SETTINGS | {"federation.num_rounds": options.rounds}
    for epsilon in [None, *options.epsilons]:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(quality(seed, epsilon, Path(folder), settings))
            print("  " + json.dumps(rows[-1]), flush=True)
        own = [row for row in rows if row["epsilon"] == epsilon]
        scores = "  ".join(f"{name} {fmean(row[name] for row in own):.3f}" for name in ("rougeL", "loss_nats"))
        print(f"epsilon {epsilon}: mean of {len(own)} seeds: {scores}", flush=True)
    return rows


def step_times(*, rows: int, tokens: int, repeats: int) -> dict[str, float]:
    """Return the time of the gradients of a batch in each way, as a ratio to that of the plain mean, printing it.

    Args:
        rows: Examples in the batch.
        tokens: Tokens of each.
        repeats: The median of so many.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = random_base(Path(folder) / "base", hidden=192, layers=6)
        loaded = load_base(ModelSettings(model_name_or_path=str(base)), folder=base).model
        tuned = TunableModel(loaded, PeftSettings(r=8, target_modules="all-linear"))
        tuned.write(tuned.initial(0))
    examples = [
        TokenisedExample(tuple((7 * n + k) % 200 for k in range(tokens)), (False, *[True] * (tokens - 1)), False, 1)
        for n in range(rows)
    ]
    model, trained = tuned.model.eval(), tuned.trainable
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: target_losses(model, collate(examples, pad_id=0))[0].mean().backward(),
        "vmap": lambda: clipped_sum(at_once(model, trained, pad_id=0)(examples), 1.0),
        "one by one": lambda: clipped_sum(one_by_one(model, trained, pad_id=0)(examples), 1.0),
    }
    times = {name: _median(way, repeats) for name, way in ways.items()}
    if find_spec("opacus"):
        times["opacus hooks"] = _median(_hooked(model, trained, examples), repeats)
    found = {name: seconds / times["plain"] for name, seconds in times.items()}
    for name, ratio in found.items():
        print(f"  {name:<14} {1000 * times[name]:7.1f} ms, {ratio:.2f} of a plain step", flush=True)
    return found


def _median(way: Callable[[], Any], repeats: int) -> float:
    way()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        way()
        times.append(time.perf_counter() - started)
    return median(times)


def _hooked(model: Any, trained: dict[str, torch.nn.Parameter], examples: list[TokenisedExample]) -> Callable[[], Any]:
    from opacus.grad_sample import GradSampleModule

    with warnings.catch_warnings(action="ignore"):
        # Its hooks sleep in evaluation mode.
        wrapped = GradSampleModule(model.train(), strict=False)

    def step() -> None:
        batch = collate(examples, pad_id=0)
        losses, row = target_losses(wrapped, batch)
        counts = torch.zeros(len(examples)).index_add(0, row, torch.ones_like(losses))
        with warnings.catch_warnings(action="ignore"):
            # Opacus takes the loss for a mean over the batch.
            ((losses / counts[row]).sum() / len(examples)).backward()
        clipped_sum({name: value.grad_sample for name, value in trained.items()}, 1.0)
        for value in trained.values():
            value.grad_sample = None

    return step


def main() -> None:
    """Print both tables as text and, at the end, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["quality", "time"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epsilons", type=float, nargs="*", default=[8.0, 3.0, 1.0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of the table of times")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    if options.only != "quality":
        torch.set_num_threads(options.threads)
        found["time"] = step_times(rows=16, tokens=64, repeats=9)
    if options.only != "time":
        found["quality"] = quality_table(options)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
