"""Ten parties on the demo's task: whoever sells a product has examples of it, and a number says how unlike they are."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from common import write_records

from fedllm.data.adverts import AdvertTask, Record, common_test, party_examples
from fedllm.job.job import Job, LocatedParty
from fedllm.job.party import Party
from fedllm.seeds import global_torch_stream, stream

# The script that made the demo's base model.
sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

NAMES = tuple(f"party-{number}" for number in range(10))
EXAMPLES = 120
TEST_PER_PRODUCT = 12
PRETRAINING_STEPS = 800


def product_of(record: Record) -> str:
    """Return what a record advertises.

    Args:
        record: One of the task's.
    """
    return record["prompt"].split("*")[0].removeprefix("type#")


def shares(seed: int, *, concentration: float | None) -> tuple[dict[str, list[Record]], list[Record]]:
    """Return each party's training examples, all parties having as many, and a common test set.

    A party's mix of the eight products is drawn from a Dirichlet distribution (Hsu et al. 2019, arXiv:1909.06335,
    section 3): at 0.01 nearly every party has one product. The test set is of the products that any party has.

    Args:
        seed: Of the draw and of the house styles.
        concentration: Of the Dirichlet distribution, the same for each product; None: the parties are alike.
    """
    task = AdvertTask(
        seed=seed,
        num_parties=1,
        train_per_product=EXAMPLES * len(NAMES),
        test_per_product=TEST_PER_PRODUCT,
        shuffle_products=False,
    )
    (examples,) = party_examples(task).values()
    pools: dict[str, list[Record]] = {}
    for record in examples:
        pools.setdefault(product_of(record), []).append(record)
    found, products = {}, sorted(pools)
    for party in NAMES:
        draw = stream(seed, "dirichlet", party)
        mix = [1 / len(products)] * len(products)
        if concentration is not None:
            mix = draw.dirichlet([concentration] * len(products)).tolist()
        found[party] = [pools[products[index]].pop() for index in draw.choice(len(products), EXAMPLES, p=mix)]
    known = {product_of(record) for records in found.values() for record in records}
    return found, [record for record in common_test(task) if product_of(record) in known]


def small_base(folder: Path) -> Path:
    """Return a base model as the demo's, with a fifth of its parameters, pretrained the same way (about a minute).

    Args:
        folder: Where it goes; what is there already is taken.
    """
    from make_demo_base import SEED, pretrain
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if (folder / "done").exists():
        return folder
    demo = str(files("fedllm") / "assets" / "demo" / "base")
    tokenizer = AutoTokenizer.from_pretrained(demo)
    config = AutoConfig.from_pretrained(demo, hidden_size=64, intermediate_size=176, num_hidden_layers=2, head_dim=16)
    torch.set_num_threads(1)
    with global_torch_stream(SEED, "small", "init"):
        model = AutoModelForCausalLM.from_config(config)
    pretrain(model, tokenizer, PRETRAINING_STEPS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "done").touch()
    return folder


def job_folder(folder: Path, seed: int, *, concentration: float | None) -> Path:
    """Return a folder with ten parties' data and a test set.

    Args:
        folder: Where they go.
        seed: Of the data.
        concentration: See `shares`.
    """
    found, test = shares(seed, concentration=concentration)
    write_records(folder / "data" / "test.jsonl", test)
    for party, records in found.items():
        write_records(folder / "data" / f"{party}.jsonl", records)
    return folder


def located_parties(folder: Path) -> list[LocatedParty]:
    """Return the ten parties of a folder. None of them holds examples back: the common test set judges.

    Args:
        folder: From `job_folder`.
    """
    sources = {name: {"train": f"data/{name}.jsonl", "eval_share": 0.0} for name in NAMES}
    return [
        LocatedParty(party=Party.model_validate({"name": name, "data": source}), base_dir=folder)
        for name, source in sources.items()
    ]


def job_of(folder: Path, base: Path, *, seed: int, **sections: dict[str, Any]) -> Job:
    """Return a job over a folder's parties.

    Args:
        folder: From `job_folder`.
        base: The base model's folder.
        seed: The job's.
        sections: `federation`, `train`, `peft` settings, beside those that all have in common.
    """
    plan = {
        "name": "ten-parties",
        "seed": seed,
        "parties": list(NAMES),
        "model": {"model_name_or_path": str(base.resolve())},
        "federation": {"min_parties": len(NAMES), "keep": "last"} | sections.get("federation", {}),
        "peft": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | sections.get("peft", {}),
        "data": {"max_length": 128},
        "train": {"per_device_train_batch_size": 8, "optimizer_state": "reset"} | sections.get("train", {}),
        "evaluate": {"test": "data/test.jsonl"},
        "runtime": {"num_threads": 1},
    }
    return Job.model_validate(plan).located(folder)
