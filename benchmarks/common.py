"""What the benchmarks share: a random base model of a chosen size, and job folders around it."""

from __future__ import annotations

import json
import os
import platform
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

# Before torch is loaded: as the command line does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from fedllm.job.job import Job, LocatedParty
from fedllm.job.party import Party
from fedllm.seeds import global_generators_kept


def random_base(folder: Path, *, hidden: int, layers: int) -> Path:
    """Return a folder with a random Llama and the demo's tokenizer.

    Args:
        folder: Where to write it.
        hidden: Its hidden size, a multiple of 32.
        layers: Its layers.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(str(files("fedllm") / "assets" / "demo" / "base"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with global_generators_kept():
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_parties(folder: Path, *, names: list[str], examples: int, words: int) -> list[LocatedParty]:
    """Return parties with random examples, all of one length.

    Args:
        folder: Where their data go.
        names: The parties.
        examples: Examples of each.
        words: Words of each completion.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parties = []
    for number, name in enumerate(names):
        draw = random.Random(number)
        answers = [" ".join(str(draw.randrange(10)) for _ in range(words)) for _ in range(examples)]
        rows = [{"prompt": f"{draw.randrange(1000)} ", "completion": answer} for answer in answers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        source: dict[str, Any] = {"train": f"{name}.jsonl", "eval_share": 0.0}
        parties.append(LocatedParty(party=Party.model_validate({"name": name, "data": source}), base_dir=folder))
    return parties


def make_job(base: Path, names: list[str], **sections: dict[str, Any]) -> Job:
    """Return a job over a base model, without evaluation.

    Args:
        base: The base model's folder.
        names: The parties.
        sections: `federation`, `train`, `peft`, `runtime` settings.
    """
    federation = {"eval_every": 0, "keep": "last"} | sections.pop("federation", {})
    job = {"name": "benchmark", "parties": names, "model": {"model_name_or_path": str(base)}, "federation": federation}
    return Job.model_validate(job | sections).located(base.parent)


def machine() -> str:
    """Return one line about the machine, to stand above the numbers."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}"


def write_records(path: Path, records: list[dict[str, str]]) -> None:
    """Write records as JSON lines.

    Args:
        path: The file.
        records: What to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
