"""The paper's experiment over several seeds: each party alone, federated, pooled; one common test set.

A seed decides the knowledge of the parties, who sells what, the first adapter and the order of the data; the base
model is the demo's. Run: python benchmarks/quality.py   (about 8 minutes a seed on 2 cores)
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import machine

from fedllm import Job, Watch, compare
from fedllm.data.adverts import AdvertTask, Record, common_test, party_examples
from fedllm.job.job import load_parties
from fedllm.runtime.scaffold import write_job_folder

SETTINGS = {
    "federation.num_rounds": 25,
    "federation.eval_every": 1,
    "train.local_steps": 12,
    "evaluate.max_examples": 160,
}


def job_folder(folder: Path, task: AdvertTask, settings: dict[str, Any]) -> Job:
    """Return a job on data of one draw of the task.

    Args:
        folder: Where job, data and base model go.
        task: The draw.
        settings: Dotted job settings.
    """
    write_job_folder(folder)
    for party, records in party_examples(task).items():
        _write(folder / "data" / party / "train.jsonl", records)
    _write(folder / "data" / "test.jsonl", common_test(task))
    overrides = [f"{key}={value}" for key, value in {"seed": task.seed, **settings}.items()]
    return Job.from_yaml(folder / "job.yaml", overrides=overrides)


def _write(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def one_seed(seed: int, folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the comparison's rows for a seed, printing them.

    Args:
        seed: The seed.
        folder: Where its files go.
        settings: Dotted job settings.
    """
    job = job_folder(folder, AdvertTask(seed=seed), settings)
    found = compare(job, parties=load_parties(job), output=folder / "run", watch=Watch())
    print(f"\nseed {seed}")
    for row in found.rows:
        scores = "  ".join(f"{name} {row[name]:6.2f}" for name in ("rouge1", "rouge2", "rougeL", "bleu4"))
        print(f"  {row['model']:<14} {scores}  loss {row['loss_nats']:.3f}")
    print(f"  {found.sentence}", flush=True)
    return found.rows


def shares(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the benchmark promises, from one seed's rows.

    Args:
        rows: The comparison's rows.
    """
    alone = [row for row in rows if row["kind"] == "alone"]
    federated, pooled = (next(row for row in rows if row["kind"] == kind) for kind in ("federated", "pooled"))
    mean = sum(row["rougeL"] for row in alone) / len(alone)
    return {
        "recovered": (federated["rougeL"] - mean) / (pooled["rougeL"] - mean),
        "beats_best_rougeL": federated["rougeL"] > max(row["rougeL"] for row in alone),
        "beats_best_loss": federated["loss_nats"] < min(row["loss_nats"] for row in alone),
    }


def main() -> None:
    """Run all seeds and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="Another job setting.")
    args = parser.parse_args()
    settings = SETTINGS | dict(item.split("=", 1) for item in args.set)
    print(machine())
    print(", ".join(f"{key}={value}" for key, value in settings.items()))
    with tempfile.TemporaryDirectory() as temporary:
        found = {seed: shares(one_seed(seed, Path(temporary) / str(seed), settings)) for seed in args.seeds}
    print("\nseed  gap closed  above best party: ROUGE-L  loss")
    for seed, share in found.items():
        beats = ["yes" if share[name] else "NO" for name in ("beats_best_rougeL", "beats_best_loss")]
        print(f"{seed:>4}  {share['recovered']:>9.1%}  {beats[0]:>24}  {beats[1]:>4}")


if __name__ == "__main__":
    main()
