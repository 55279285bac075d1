"""Client drift: every rule for LoRA's factors, over ten parties whose data are more and more unlike, three seeds.

Run: python benchmarks/aggregation.py --output FOLDER   (about 6 minutes a rule on one core)

The task is the demo's; a party's mix of the eight products is drawn from a Dirichlet distribution, 0.5, 0.1 and 0.01:
at 0.01 nearly every party has one product of its own. The base model is a fifth of the demo's, made by the script. Each
rule has the learning rate of GRID that ends lowest on seed 0 at 0.1, which is none of the three seeds. Local optimisers
start afresh each round, since FlexLoRA needs that, and the server adds the mean (FedAvg).

Each run's result is a line of FOLDER/results.jsonl; a call that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from common import machine
from ten_parties import job_folder, job_of, located_parties, small_base

from fedllm.runtime.judge import final_models, judge, test_set
from fedllm.runtime.run import run_local
from fedllm.runtime.site import common_examples, open_site
from fedllm.scenarios.fedhomollm import Settings

# Rule -> other settings that it needs. What this version does not know is left out.
RULES: dict[str, dict[str, Any]] = {
    "FedIT": {},
    "FFA-LoRA": {},
    "RoLoRA": {},
    "FlexLoRA": {},
    "FedEx-LoRA": {},
    "FLoRA": {},
    "FedSA-LoRA": {},
}
KNOWN = [rule for rule in RULES if rule in get_args(Settings.model_fields["lora_rule"].annotation)]
CONCENTRATIONS = (0.5, 0.1, 0.01)
SEEDS = (1, 2, 3)
GRID = (0.003, 0.01, 0.03, 0.1)
TUNED_AT = (0, 0.1)
ROUNDS, STEPS = 8, 10


@dataclass(frozen=True)
class Case:
    """One run."""

    rule: str
    concentration: float
    seed: int
    learning_rate: float


def result_of(case: Case, base: Path) -> dict[str, Any]:
    """Return a run's figures.

    Args:
        case: The run.
        base: The base model's folder.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = job_folder(Path(temporary) / "job", case.seed, concentration=case.concentration)
        federation = {"num_rounds": ROUNDS, "eval_every": ROUNDS, "lora_rule": case.rule} | RULES[case.rule]
        train = {"local_steps": STEPS, "learning_rate": case.learning_rate}
        job, parties = job_of(folder, base, seed=case.seed, federation=federation, train=train), located_parties(folder)
        run = run_local(job, parties=parties, output=Path(temporary) / "run")
        site = open_site(job, parties)
        test = test_set(site, common_examples(job))
        # With FedSA-LoRA each party has a model of its own: their mean.
        scores = [judge(site, test, tensors) for _, _, tensors in final_models(run.path, site)]
        after = {key: statistics.fmean(score[key] for score in scores) for key in ("loss_nats", "rougeL")}
        rows = run.rows()
    first = next(row for row in rows if (row["name"], row["split"], row["round"]) == ("loss_nats", "common", 0))
    drift = [row["value"] for row in rows if row["name"] == "lora_drift" and row["value"] is not None]
    up = [row["value"] for row in rows if row["name"] == "bytes_up" and row["round"] > 0]
    return asdict(case) | {
        "base_loss": first["value"],
        "loss": after["loss_nats"],
        "rougeL": after["rougeL"],
        "drift": statistics.fmean(drift) if drift else None,
        "bytes_up": sum(up) / len(parties) / ROUNDS,
    }


class Results:
    """The figures of all runs so far; a run that has been done is not done again."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._base, self._file = small_base(folder / "base"), folder / "results.jsonl"
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        self._rows = [json.loads(line) for line in lines]

    def of(self, case: Case) -> dict[str, Any]:
        """Return a run's figures.

        Args:
            case: The run.
        """
        for row in self._rows:
            if asdict(case).items() <= row.items():
                return row
        row = result_of(case, self._base)
        self._rows.append(row)
        with self._file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        print(f"  {row}", flush=True)
        return row


def tuned(results: Results, rule: str) -> float:
    """Return a rule's learning rate.

    Args:
        results: All runs.
        rule: The rule.
    """
    seed, concentration = TUNED_AT
    return min(GRID, key=lambda rate: results.of(Case(rule, concentration, seed, rate))["loss"])


def lines(results: Results, rates: dict[str, float]) -> Iterator[str]:
    """Yield the table's lines.

    Args:
        results: All runs.
        rates: Rule -> learning rate.
    """
    yield "| Dirichlet | rule | learning rate | loss, nats | by seed | ROUGE-L | kB up | drift |"
    yield "|---|---|---|---|---|---|---|---|"
    for concentration in CONCENTRATIONS:
        rule, rate = next(iter(rates.items()))
        base = [results.of(Case(rule, concentration, seed, rate))["base_loss"] for seed in SEEDS]
        yield f"| {concentration} | base model | | {statistics.fmean(base):.4f} | {joined(base)} | | | |"
        for rule, rate in rates.items():
            rows = [results.of(Case(rule, concentration, seed, rate)) for seed in SEEDS]
            loss, rouge, up = (statistics.fmean(row[key] for row in rows) for key in ("loss", "rougeL", "bytes_up"))
            drifts = [row["drift"] for row in rows if row["drift"] is not None]
            drift = f"{statistics.fmean(drifts):.0%}" if drifts else ""
            figures = f"{loss:.4f} | {joined([row['loss'] for row in rows])} | {rouge:.1f} | {up / 1e3:.1f} | {drift}"
            yield f"| {concentration} | {rule} | {rate} | {figures} |"


def joined(values: list[float]) -> str:
    """Return the values, for a cell.

    Args:
        values: One for each seed.
    """
    return ", ".join(f"{value:.4f}" for value in values)


def main() -> None:
    """Do what is left to do, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the base model and the results")
    parser.add_argument("--rules", nargs="+", default=KNOWN, choices=KNOWN, help="rules to run; all by default")
    args = parser.parse_args()
    results = Results(args.output)
    rates = {rule: tuned(results, rule) for rule in args.rules}
    for seed in SEEDS:
        for concentration in CONCENTRATIONS:
            for rule, rate in rates.items():
                results.of(Case(rule, concentration, seed, rate))
    print(f"\n{machine()}; {ROUNDS} rounds of {STEPS} steps, 10 parties, seeds {SEEDS}\n")
    print("\n".join(lines(results, rates)))


if __name__ == "__main__":
    main()
