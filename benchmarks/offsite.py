"""Offsite tuning: the five models for each way to build an emulator, federated against alone, and the thief's reach.

Run: python benchmarks/offsite.py                      (about 40 minutes on one core, with the recipe's model)
     python benchmarks/offsite.py --seeds 0 1 2        (pretrains a model for each further seed: ten minutes)
     python benchmarks/offsite.py --only table --seeds 1 --json table1.json
     python benchmarks/offsite.py --read table0.json table1.json    (prints the means of what was measured before)

The whole model has eight layers and is pretrained by scripts/make_offsite_base.py: all layers on a general skill, then
the four in the middle on a catalogue. Its two first and two last layers are tuned by LoRA on letters about six
products; losses are those of letters about eight other products, in nats per target. Public text, for distillation,
says nothing of the catalogue. In the part `spread` all layers have learnt the catalogue, as long.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from common import machine, write_records

from fedllm.aggregate.folded import split
from fedllm.job.job import Job, LocatedParty
from fedllm.job.party import Party
from fedllm.models.adapter import TunableModel
from fedllm.runtime.compare import alone
from fedllm.runtime.emulator import Owner, make_package, open_bench, owner_of
from fedllm.runtime.emulator_check import Bench, Figures, measure, tuned_directly, verdict
from fedllm.runtime.judge import final_tensors
from fedllm.runtime.run import run_local

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import make_offsite_base

RECIPE = Path(str(files("fedllm") / "assets" / "recipes" / "offsite"))
CACHE = Path(tempfile.gettempdir()) / "fedllm-offsite-bases"
STEPS, DISTIL = 80, 150
ROWS = [(steps, way, keep) for steps in (DISTIL, 0) for way in ("uniform", "influence", "crash") for keep in (3, 2, 1)]
LITTLE = {"realign_every": 2, "realign_steps": 20, "realign_rank": 4}
MUCH = {"realign_every": 1, "realign_steps": 60, "realign_rank": 16}
PROX = {"strategy": {"name": "FedProx", "proximal_mu": 0.1}}
REALIGNED: list[tuple[str, str, dict[str, Any]]] = [
    ("never", "FedAvg", {}),
    ("never", "FedProx, 0.1", PROX),
    ("every 2 rounds, 20 steps, rank 4", "FedAvg", LITTLE),
    ("every 2 rounds, 20 steps, rank 4", "FedProx, 0.1", LITTLE | PROX),
    ("every round, 60 steps, rank 16", "FedAvg", MUCH),
]
JOB: dict[str, Any] = {
    "name": "letters",
    "parties": ["owner", "north", "east", "south"],
    "scenario": "FedOST",
    "federation": {"owner": "owner", "num_rounds": 8, "keep": "last", "eval_every": 0, "plug_every": 0},
    "model": {"model_name_or_path": "package"},
    "peft": {"peft_type": "LORA", "r": 4, "lora_alpha": 8},
    "data": {"max_length": 160},
    "train": {
        "local_steps": STEPS // 8,
        "learning_rate": 4e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "per_device_train_batch_size": 8,
    },
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="base models; 0 is the recipe's")
    parser.add_argument(
        "--only", choices=["table", "federated", "realign", "thief", "spread", "outer"], help="one part alone"
    )
    parser.add_argument("--times", type=int, nargs="+", default=[1, 10], help="the thief's budgets")
    parser.add_argument("--json", type=Path, help="write all figures into this file")
    parser.add_argument("--read", type=Path, nargs="+", help="measure nothing, and print the means of such files")
    options = parser.parse_args()
    if options.read:
        means([row for file in options.read for row in json.loads(file.read_text(encoding="utf-8"))])
        return
    torch.set_num_threads(1)
    print(machine(), flush=True)
    found: list[dict[str, Any]] = []
    parts = {"table": table, "federated": federated, "realign": realign, "outer": outer}
    parts |= {name: partial(thief, times=options.times, spread=name == "spread") for name in ("thief", "spread")}
    for seed in options.seeds:
        for name, part in parts.items():
            if options.only in (None, name):
                with tempfile.TemporaryDirectory() as folder:
                    found += [{"seed": seed, "part": name, **row} for row in part(Path(folder), seed)]
                if options.json:
                    options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if len(options.seeds) > 1:
        means(found)


def means(found: list[dict[str, Any]]) -> None:
    """Print each row's means over the seeds, and between what they lie, of the figures that all rows have."""
    for part in dict.fromkeys(row["part"] for row in found):
        rows = [row for row in found if row["part"] == part]
        names = [
            name for name, value in rows[0].items() if isinstance(value, float) and all(name in row for row in rows)
        ]
        print(f"\n| {part}, {len({row['seed'] for row in rows})} seeds | {' | '.join(names)} |")
        print("|---" * (len(names) + 1) + "|")
        for title in dict.fromkeys(row["row"] for row in rows):
            same = [row for row in rows if row["row"] == title]
            print(f"| {title} | {' | '.join(spread_of([row[name] for row in same]) for name in names)} |", flush=True)


def spread_of(values: list[float]) -> str:
    """Return a mean, and the least and the largest value."""
    mean = sum(values) / len(values)
    return f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else f"{mean:.3f}"


def base_of(seed: int, *, spread: bool = False) -> Path:
    """Return the whole model of a seed: the recipe's, or one that is made now and kept.

    Args:
        seed: The seed.
        spread: One whose catalogue is in all layers.
    """
    if seed == 0 and not spread:
        return RECIPE / "full"
    folder = CACHE / f"{'spread' if spread else 'seed'}{seed}"
    if not (folder / "config.json").exists():
        outer = 0 if spread else make_offsite_base.OUTER
        make_offsite_base.make_base(folder, seed=make_offsite_base.SEED + seed, outer=outer)
    return folder


def owner(
    folder: Path, seed: int, *, base: Path | None = None, peft: dict[str, Any] | None = None, **settings: Any
) -> Owner:
    """Return the owner's side of the job, with data in a folder."""
    make_offsite_base.write_data(folder)
    changes = {"seed": seed, "peft": peft or JOB["peft"], "runtime": {"num_threads": 1}}
    job = Job.model_validate(JOB | changes).located(folder)
    policy = {"check_steps": STEPS}
    emulator = {
        "bottom": 2,
        "top": 2,
        "public": "data/public.jsonl",
        "full_model_name_or_path": str(base or base_of(seed)),
    }
    return owner_of(job, parties(folder, emulator | {"policy": policy} | settings))


def parties(folder: Path, emulator: dict[str, Any]) -> list[LocatedParty]:
    """Return the party files; the owner's probe set is all parties' data together, and letters about other products."""
    together = [
        json.loads(line)
        for name in JOB["parties"][1:]
        for line in (folder / "data" / name / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    write_records(folder / "data" / "probe" / "train.jsonl", together)
    data = {name: {"train": f"data/{name}/train.jsonl", "eval_share": 0.05} for name in JOB["parties"][1:]}
    data["owner"] = {"train": "data/probe/train.jsonl", "eval": "data/probe/eval.jsonl"}
    found = [{"name": name, "data": data[name]} for name in JOB["parties"]]
    found[0]["emulator"] = emulator
    return [LocatedParty(party=Party.model_validate(file), base_dir=folder) for file in found]


def made(side: Owner, folder: Path, name: str) -> Bench:
    """Return what models are measured with, for a package that is made into a folder."""
    make_package(side, folder / name)
    return open_bench(side, folder / name)


def shown(name: str, figures: Figures) -> dict[str, Any]:
    """Print a row, and return it."""
    recovered = figures.recovered
    cells = " | ".join(f"{loss:.3f}" for loss in figures.values().values())
    print(f"| {name} | {cells} | {recovered:.0%} |" if recovered is not None else f"| {name} | {cells} | |", flush=True)
    return {"row": name, **figures.values(), "recovered": recovered}


def table(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Return the five models for each way to build, with and without distillation."""
    print("\n| middle kept of 4 | Full-ZS | Emu-ZS | OT-Emu | Plug | FT | recovered |\n|---|---|---|---|---|---|---|")
    found, direct = [], None
    for steps, way, keep in ROWS:
        side = owner(folder, seed, way=way, middle=keep, distil_steps=steps)
        bench = made(side, folder, f"{way}{keep}-{steps}")
        direct = direct or tuned_directly(bench)
        name = f"{keep}, {way}, {'distilled' if steps else 'as it is'}"
        found.append(shown(name, measure(bench, direct=direct, thieves=False)))
    return found


def federated(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Return the plugged losses of the federation and of each party alone, on the emulator of 2 distilled layers."""
    print("\n| tuned by | OT-Emu | Plug |\n|---|---|---|")
    side = owner(folder, seed, middle=2, distil_steps=DISTIL)
    bench = made(side, folder, "package")
    files_ = parties(folder, side.settings.model_dump())
    jobs = {"the federation": side.job} | {f"{name} alone": alone(side.job, name) for name in side.job.trainers}
    found = []
    for name, job in jobs.items():
        mine = [located for located in files_ if located.party.name in job.parties]
        emulator, plug = tuned_losses(bench, job, run_local_anyway(job, mine, folder / job.name))
        print(f"| {name} | {emulator:.3f} | {plug:.3f} |", flush=True)
        found.append({"row": name, "OT-Emu": emulator, "Plug": plug})
    return found


def tuned_losses(bench: Bench, job: Job, run: Path) -> tuple[float, float]:
    """Return OT-Emu and Plug with what a run delivers."""
    tunable, state = TunableModel(bench.fresh(), job.peft), final_tensors(run, job)
    tunable.write(state)
    with bench.full.plugged(split(state)[0], bench.package.model) as whole:
        return bench.loss(tunable.model), bench.loss(whole.model)


def realign(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Return the federation's losses with and without re-alignment of the emulator of 2 distilled layers, and FedProx.

    The owner's policy accepts all, so that it can be seen what it would forbid; of the policy without a margin it is
    said how often it would have done so.
    """
    print(
        "\n| re-aligned | strategy | distillation's loss, first and last | OT-Emu | Plug | OT-Emu below Plug "
        "|\n|---|---|---|---|---|---|"
    )
    policy = {"check_steps": STEPS, "plug_margin": -99.0, "full_zs_margin": -99.0}
    side = owner(folder, seed, middle=2, distil_steps=DISTIL, policy=policy)
    bench, found = made(side, folder, "package"), list[dict[str, Any]]()
    located = parties(folder, side.settings.model_dump())
    for name, strategy, changes in REALIGNED:
        job = Job.model_validate(side.job.model_dump() | {"federation": JOB["federation"] | changes}).located(folder)
        run = run_local(job, parties=located, output=folder / f"run{len(found)}")
        emulator, plug = tuned_losses(bench, job, run.path)
        distil = [row["value"] for row in run.rows() if row["name"].startswith("distil_loss") and not row["party"]]
        own = {key: [row["value"] for row in run.rows() if row["name"] == key] for key in ("ot_emu_nats", "plug_nats")}
        below = sum(one < other for one, other in zip(own["ot_emu_nats"], own["plug_nats"], strict=True))
        losses = f"{distil[0]:.3f}, {distil[-1]:.3f}" if distil else ""
        broken = f"{below} of {len(own['plug_nats'])}" if distil else ""
        print(f"| {name} | {strategy} | {losses} | {emulator:.3f} | {plug:.3f} | {broken} |", flush=True)
        found.append({"row": f"{name}, {strategy}", "OT-Emu": emulator, "Plug": plug, "distil": distil})
    return found


def run_local_anyway(job: Job, located: list[LocatedParty], folder: Path) -> Path:
    """Return the folder of a run, also of one party alone."""
    from fedllm.runs.folder import RunFolder
    from fedllm.runs.plan_files import write_plan
    from fedllm.runtime.local import InProcessLink, local_hosts
    from fedllm.runtime.run import carry_out
    from fedllm.runtime.site import open_site, party_tokens

    if len(located) > 1:
        return run_local(job, parties=located, output=folder).path
    site = open_site(job, located)
    run = RunFolder.create(folder, job_digest=job.digest)
    write_plan(run, job, located)
    hosts = local_hosts(site, {one.party.name: party_tokens(site, one) for one in located}, run)
    carry_out(run, job, located, InProcessLink(hosts))
    run.close()
    return folder


def thief(folder: Path, seed: int, *, times: list[int], spread: bool) -> list[dict[str, Any]]:
    """Return what thieves reach with the emulator of 2 distilled layers, and what the policy says."""
    side = owner(folder, seed, base=base_of(seed, spread=spread), middle=2, distil_steps=DISTIL)
    policy = side.settings.policy.model_copy(update={"thief_budgets": times})
    side = replace(side, settings=side.settings.model_copy(update={"policy": policy}))
    figures = measure(made(side, folder, "package"))
    print(f"\n| 2 of 4, uniform, distilled | {' | '.join(figures.values())} | recovered |")
    print("|---" * (len(figures.values()) + 2) + "|")
    row = shown("loss", figures)
    broken = verdict(figures, side.settings.policy).broken
    for reason in broken or ["allowed"]:
        print(f"the policy: {reason}", flush=True)
    return [row]


def outer(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Return the five models where fewer layers are tuned, by LoRA of rank 2, without distillation."""
    print(
        "\n| tuned layers, middle | Full-ZS | Emu-ZS | OT-Emu | Plug | FT | recovered |\n|---|---|---|---|---|---|---|"
    )
    found = []
    for bottom, top, keep in ((0, 1, 3), (0, 2, 2), (0, 2, 1), (1, 1, 3)):
        peft = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
        side = owner(folder, seed, peft=peft, bottom=bottom, top=top, middle=keep)
        bench = made(side, folder, f"outer{bottom}{top}{keep}")
        name = f"{bottom} + {top}, {keep} of {8 - bottom - top}"
        found.append(shown(name, measure(replace(bench), thieves=False)))
    return found


if __name__ == "__main__":
    main()
