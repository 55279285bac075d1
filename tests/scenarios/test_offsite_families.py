"""A whole run of FedOST with each family of models: package, rounds, plugging in, and the owner's model at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TinyFederation, mostly_thorough, records, write_jsonl, write_yaml

from fedllm.models.blocks import stacks
from fedllm.runtime.emulator import make_package, owner_of

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))
import families

_SIX: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 6},
    "bloom": {"n_layer": 6},
    "t5": {"num_layers": 6, "num_decoder_layers": 5},
    "bart": {"encoder_layers": 6, "decoder_layers": 5},
}
JOB: dict[str, Any] = {
    "scenario": "FedOST",
    "federation.owner": "boss",
    "federation.keep": "last",
    "federation.num_rounds": 1,
    "model.model_name_or_path": "package",
    "peft": {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    "train.local_steps": 1,
}
NAMES = (*families.DECODERS, *families.ENCODER_DECODERS)
Make = Callable[..., TinyFederation]


def federation_of(family: str, make: Make, full: Path) -> TinyFederation:
    """Write a federation whose owner has six blocks of a family, or six and five; two of the middle are kept."""
    task = "seq2seq_lm" if family in families.ENCODER_DECODERS else "causal_lm"
    families.save_family(family, task, full)  # type: ignore[arg-type]
    made: TinyFederation = make(sizes={"north": 4, "east": 3, "boss": 3}, job=JOB | {"data.task": task})
    write_jsonl(made.folder / "data" / "public.jsonl", records("public", 6))
    emulator = {"full_model_name_or_path": str(full), "bottom": 1, "top": 1, "middle": 2}
    distilled = {"public": "../data/public.jsonl", "distil_steps": 1}
    data = {"train": "../data/boss.jsonl", "eval": "../data/boss-eval.jsonl"}
    write_yaml(made.folder / "parties" / "boss.yaml", {"name": "boss", "data": data, "emulator": emulator | distilled})
    return made


def owners_model(folder: Path, family: str) -> Any:
    import transformers

    auto = (
        transformers.AutoModelForSeq2SeqLM if family in families.ENCODER_DECODERS else transformers.AutoModelForCausalLM
    )
    return auto.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", mostly_thorough(NAMES, "gpt2", "mixtral", "t5"))
def test_a_run_tunes_the_owner_s_model_of_each_family(
    family: str, make_federation: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = families.FAMILIES[family] | _SIX.get(family, {"num_hidden_layers": 6})
    monkeypatch.setitem(families.FAMILIES, family, deep)
    made = federation_of(family, make_federation, tmp_path / "full")
    assert make_package(owner_of(made.job()), made.folder / "package").found == ()
    result = made.run()
    assert result.status == "SUCCESS"
    rows = {(row["round"], row["split"]): row["value"] for row in result.rows() if row["name"] == "loss_nats"}
    assert rows[1, "plugged"] != rows[0, "plugged"]
    delivered = result.path / "parties" / "boss" / "model"
    model, before = owners_model(delivered, family), owners_model(tmp_path / "full", family)
    check_only_outer_blocks_differ(model, before)
    text = torch.arange(5, 11).reshape(1, -1)
    written = [
        model.generate(text, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*written)
    assert not any(name.startswith("fedllm") for name in model.config.to_dict())
    # And no client's file has as many blocks.
    assert len(load_file(made.folder / "package" / "model.safetensors")) < len(before.state_dict())


def check_only_outer_blocks_differ(model: Any, before: Any) -> None:
    theirs = before.state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, theirs[name])}
    for path, blocks in stacks(model).items():
        outer = {f"{path}.0.", f"{path}.{len(blocks) - 1}."}
        own = {name for name in changed if name.startswith(f"{path}.")}
        assert all(any(name.startswith(start) for name in own) for start in outer)
        changed -= {name for name in own if name.startswith(tuple(outer))}
    assert changed == set()
