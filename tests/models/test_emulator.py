"""Emulators of every family with blocks: the right layers, one cache as without it, the same after saving."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.models.blocks import Cut, stacks
from fedllm.models.emulator import choose, sliced
from fedllm.models.load import load_base
from fedllm.models.package import Made, write_package
from fedllm.models.settings import ModelSettings
from fedllm.tasks import Task

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))
import families

CUT = Cut(1, 1)
_SIX = {
    "gpt2": {"n_layer": 6},
    "bloom": {"n_layer": 6},
    "t5": {"num_layers": 6, "num_decoder_layers": 5},
    "bart": {"encoder_layers": 6, "decoder_layers": 5},
}
NAMES = (*families.DECODERS, *families.ENCODER_DECODERS)


def deep_model(family: str) -> Any:
    """Return a random model of six blocks, or six and five."""
    import transformers

    from fedllm.seeds import global_generators_kept

    config = families.config_of(family)
    for key, value in _SIX.get(family, {"num_hidden_layers": 6}).items():
        setattr(config, key, value)
    values = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
    config = type(config).from_dict(values)
    auto = transformers.AutoModelForSeq2SeqLM if is_pair(family) else transformers.AutoModelForCausalLM
    with global_generators_kept():
        model = auto.from_config(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return model.requires_grad_(False).eval()


def is_pair(family: str) -> bool:
    return family in families.ENCODER_DECODERS


def text() -> torch.Tensor:
    return torch.arange(5, 17).reshape(2, 6)


def logits(model: Any, family: str, **more: Any) -> torch.Tensor:
    more |= {"decoder_input_ids": text()[:, :3]} if is_pair(family) else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=text(), **more).logits
    return found


def written(model: Any, tmp_path: Path, *, cut: Cut = CUT, storage: Any = "float32") -> Path:
    from tiny import make_tokenizer

    return write_package(Made(model, make_tokenizer(), cut, "uniform", False), tmp_path / "package", storage=storage)


def loaded(folder: Path, family: str = "llama") -> Any:
    task = Task("seq2seq_lm" if is_pair(family) else "causal_lm", ())
    return load_base(ModelSettings(model_name_or_path="package"), folder=folder, task=task).model


@pytest.mark.parametrize("family", NAMES)
def test_an_emulator_computes_what_the_kept_layers_compute_and_is_the_same_after_saving(
    family: str, tmp_path: Path
) -> None:
    model = deep_model(family)
    slots = choose(model, CUT, way="uniform", keep=2)
    emulator = sliced(model, slots, CUT)
    before = logits(emulator, family)
    assert torch.isfinite(before).all()
    # Without the layers that are left out the whole model computes the same: each of them put out of action by hand.
    for path, blocks in stacks(model).items():
        skipped(model, path, [blocks[index] for index in slots[path]])
        if types := getattr(model.config, "layer_types", None):
            model.config.layer_types = [types[index] for index in slots[path]]
    torch.testing.assert_close(logits(model, family, use_cache=False), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(emulator, family, use_cache=False), before, rtol=1e-4, atol=1e-5)
    generated = [
        emulator.generate(text()[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*generated)
    again = loaded(written(emulator, tmp_path), family)
    assert torch.equal(logits(again, family), before)
    assert {path: len(blocks) for path, blocks in stacks(again).items()} == {path: len(s) for path, s in slots.items()}


def skipped(model: Any, path: str, kept: list[Any]) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.ModuleList(kept))
    for name in ("layers", "num_layers"):
        if isinstance(getattr(model.get_submodule(owner), name, None), int):
            setattr(model.get_submodule(owner), name, len(kept))
