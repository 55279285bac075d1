"""A tiny federation of offsite tuning: an owner with six random layers, its package, and three parties that tune it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import TinyFederation, records, save_base, write_jsonl, write_yaml

from fedllm.runtime.emulator import make_package, owner_of

OWNER, LACKING = "boss", "north"
SIZES = {"north": 4, "east": 5, "south": 4, OWNER: 5}
JOB: dict[str, Any] = {
    "scenario": "FedOST",
    "federation.owner": OWNER,
    "federation.keep": "last",
    "federation.num_rounds": 1,
    "model.model_name_or_path": "package",
    "peft": {"peft_type": "LORA", "r": 2, "lora_alpha": 4},
}
EMULATOR: dict[str, Any] = {"full_model_name_or_path": "../full", "bottom": 1, "top": 1, "middle": 2}


def offsite_federation(make: Callable[..., TinyFederation], **job: Any) -> TinyFederation:
    """Return a federation in which the party `LACKING` has no package.

    Args:
        make: The fixture `make_federation`.
        job: Changes to the job; `__` stands for a dot.
    """
    changes = {key.replace("__", "."): value for key, value in job.items()}
    made = make(sizes=SIZES, job=JOB | changes)
    save_base(made.folder / "full", num_hidden_layers=6)
    write_jsonl(made.folder / "data" / "public.jsonl", records("public", 12))
    boss = {"name": OWNER, "data": data_of(OWNER), "emulator": EMULATOR}
    write_yaml(made.folder / "parties" / f"{OWNER}.yaml", boss)
    make_package(owner_of(made.job()), made.folder / "package")
    party_file(made.folder, LACKING, model_name_or_path="../nowhere")
    return made


def data_of(party: str) -> dict[str, str]:
    return {"train": f"../data/{party}.jsonl", "eval": f"../data/{party}-eval.jsonl"}


def party_file(folder: Path, party: str, **more: Any) -> Path:
    """Write a party's own file and return it.

    Args:
        folder: The federation's.
        party: The party.
        more: Other keys.
    """
    return write_yaml(folder / "parties" / f"{party}.yaml", {"name": party, "data": data_of(party)} | more)
