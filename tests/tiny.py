"""Small things to test with: a random Llama with its tokenizer, and a federation of a few lines of data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from fedllm.job.job import Job, LocatedParty, load_parties
from fedllm.runs.jsonl import Row, read_rows
from fedllm.runtime.run import RunResult, run_local

# `make thorough` takes all that `make test` takes a part of.
THOROUGH = bool(os.environ.get("FEDLLM_THOROUGH"))
thorough = pytest.mark.skipif(not THOROUGH, reason="part of make thorough")


def mostly_thorough(cases: Iterable[str], *by_default: str) -> list[Any]:
    """Return cases for `parametrize`, of which `make test` takes some and `make thorough` all.

    Args:
        cases: All of them.
        by_default: Those that `make test` takes.
    """
    cases = list(cases)
    assert set(by_default) <= set(cases)
    return [case if case in by_default else pytest.param(case, marks=thorough) for case in cases]


_CORPUS = ["the red dress is made of silk", "a blue coat, warm and long", "say what it is made of", "north south east"]
_WORDS = ("red", "blue", "silk", "warm", "long", "coat", "dress", "made")


def make_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer of 300 tokens with bos, eos and pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_base(folder: Path, *, seed: int = 0, head: float = 1.0, **config: Any) -> Path:
    """Write a random Llama (hidden 32, 2 layers) with its tokenizer into a folder and return it.

    Args:
        folder: Where it goes.
        seed: Of its weights.
        head: Factor of the head's weights. With 1 the likeliest token has a fifth of the chances at most, however the
            layers below are tuned, and what greedy generation writes hangs by a hair.
        config: Other values of `LlamaConfig`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**sizes | config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
        model.lm_head.weight.mul_(head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def records(party: str, count: int) -> list[dict[str, str]]:
    """Return prompt/completion records of different lengths, another set for each party.

    Args:
        party: Whose they are.
        count: How many.
    """
    shift = sum(party.encode())

    def answer(i: int) -> str:
        return " ".join(_WORDS[(shift + i * 3 + k) % len(_WORDS)] for k in range(1 + (shift + i) % 4))

    return [{"prompt": f"{party} {i}: ", "completion": answer(i)} for i in range(count)]


def write_yaml(path: Path, value: Any) -> Path:
    """Write a value as YAML 1.2 and return the path.

    Args:
        path: The file.
        value: What to write.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as handle:
        yaml.dump(value, handle)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Write records, or raw lines, and return the path.

    Args:
        path: The file.
        rows: Records or lines.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def with_changes(tree: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested dict with `{"train.local_steps": 2}`-like changes; None takes a key out.

    Args:
        tree: The dict, left as it is.
        changes: Dotted key -> value.
    """
    result = json.loads(json.dumps(tree))
    for dotted, value in changes.items():
        *above, last = dotted.split(".")
        target = result
        for key in above:
            target = target.setdefault(key, {})
        if value is None:
            target.pop(last, None)
        else:
            target[last] = value
    return result


@dataclass(frozen=True)
class TinyFederation:
    """A folder with job.yaml, parties/ and data/."""

    folder: Path

    @property
    def job_file(self) -> Path:
        """The job file."""
        return self.folder / "job.yaml"

    def job(self) -> Job:
        """Return the job."""
        return Job.from_yaml(self.job_file)

    def parties(self) -> list[LocatedParty]:
        """Return the parties."""
        return load_parties(self.job())

    def run(self, name: str = "run", **options: Any) -> RunResult:
        """Run the job in a subfolder and return the result.

        Args:
            name: The run folder's name.
            options: For `run_local`.
        """
        return run_local(self.job(), output=self.folder / name, **options)


def tiny_federation(
    folder: Path,
    base: Path,
    *,
    sizes: Mapping[str, int] | None = None,
    job: Mapping[str, Any] | None = None,
    party: Mapping[str, Any] | None = None,
) -> TinyFederation:
    """Write a job of two rounds with its parties and data, and return it.

    Args:
        folder: Where it goes.
        base: The base model's folder.
        sizes: Party -> training examples; each has 3 held-out examples besides.
        job: Changes to job.yaml, `{"train.local_steps": 2}`.
        party: Changes to every party file.
    """
    sizes = sizes or {"north": 6, "east": 9, "south": 4}
    plan: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "parties": list(sizes),
        "federation": {"num_rounds": 2},
        "model": {"model_name_or_path": str(base)},
        "peft": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
        "data": {"max_length": 48},
        "train": {"local_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 3},
    }
    write_yaml(folder / "job.yaml", with_changes(plan, job or {}))
    for name, count in sizes.items():
        write_jsonl(folder / "data" / f"{name}.jsonl", records(name, count))
        write_jsonl(folder / "data" / f"{name}-eval.jsonl", records(f"{name} held out", 3))
        file = {"name": name, "data": {"train": f"../data/{name}.jsonl", "eval": f"../data/{name}-eval.jsonl"}}
        write_yaml(folder / "parties" / f"{name}.yaml", with_changes(file, party or {}))
    return TinyFederation(folder)


def bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """Return the bytes of each tensor, to compare bit for bit.

    Args:
        tensors: Named tensors.
    """
    flat = {name: tensor.contiguous().reshape(-1) for name, tensor in tensors.items()}
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in flat.items()}


def journal(run: Path) -> list[tuple[int, str]]:
    """Return the journal's (round, step) pairs.

    Args:
        run: The run folder.
    """
    return [(row["round"], row["step"]) for row in read_rows(run / "journal.jsonl")]


def row_keys(rows: list[Row]) -> list[tuple[Any, ...]]:
    """Return what names each metric row: round, party, split, name.

    Args:
        rows: Metric rows.
    """
    return [(row["round"], row["party"], row["split"], row["name"]) for row in rows]
