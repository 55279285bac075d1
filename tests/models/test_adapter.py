"""The adapter: first values from the seed, exchanged by name, delivered in PEFT's layout."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import bits, save_base

from fedllm.errors import ModelError
from fedllm.models.adapter import TunableModel, skeleton
from fedllm.models.deliver import save_adapter
from fedllm.models.load import load_base
from fedllm.models.settings import ModelSettings, PeftSettings

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8},
    "attention only": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "regular expression": {"r": 2, "target_modules": r".*\.0\.self_attn\.(q|k)_proj"},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "embeddings": {"r": 2, "target_modules": ["embed_tokens", "q_proj"]},
    "head in full": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "norms in full": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"], "use_dora": True},
}
IDS = torch.tensor([[3, 40, 80, 120, 60, 7], [9, 9, 30, 200, 11, 2]])


def fresh(base: Path) -> Any:
    return load_base(ModelSettings(model_name_or_path=str(base)), folder=base).model


def tunable(base: Path, method: str) -> TunableModel:
    return TunableModel(fresh(base), PeftSettings(**METHODS[method]))


def moved(model: TunableModel) -> dict[str, torch.Tensor]:
    """Return values away from the start in every tensor, and set them."""
    generator = torch.Generator().manual_seed(1)
    values = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.initial(3).items()
    }
    model.write(values)
    return values


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_first_adapter_is_a_function_of_the_seed(method: str, base: Path) -> None:
    first = tunable(base, method).initial(7)
    torch.rand(13)
    assert bits(tunable(base, method).initial(7)) == bits(first)
    other = tunable(base, method).initial(8)
    drawn = [name for name in first if not torch.equal(first[name], other[name])]
    assert drawn == [name for name in first if "lora_A" in name or "lora_embedding_B" in name]


@pytest.mark.parametrize("method", METHODS)
def test_the_first_adapter_does_not_change_with_what_was_trained_since(method: str, base: Path) -> None:
    model = tunable(base, method)
    first = model.initial(7)
    moved(model)
    assert bits(model.initial(7)) == bits(first)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_adapter_changes_nothing_that_the_base_says(method: str, base: Path) -> None:
    expected = logits(fresh(base))
    model = tunable(base, method)
    model.write(model.initial(7))
    torch.testing.assert_close(logits(model.model), expected, atol=1e-5, rtol=1e-5)


def test_the_values_of_seed_7_are_these(base: Path) -> None:
    # The same on every machine and with every version of the libraries: a change breaks all runs to be repeated.
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    values = tunable(base, "lora").initial(7)[name]
    assert tuple(values.shape) == (4, 32)
    assert [round(float(value), 6) for value in values.flatten()[:5]] == FIRST_OF_SEED_7


FIRST_OF_SEED_7 = [-0.069912, -0.047766, 0.170954, -0.129779, 0.054944]


def test_lora_a_is_kaiming_uniform_as_in_peft(base: Path) -> None:
    model = TunableModel(fresh(base), PeftSettings(r=64, target_modules=["down_proj"]))
    drawn = torch.cat([tensor.flatten() for name, tensor in model.initial(1).items() if "lora_A" in name])
    bound = 64**-0.5
    assert 0.98 * bound < drawn.abs().max() <= bound
    assert drawn.mean().abs() < 0.02 * bound
    assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    theirs = torch.cat(
        [parameter.detach().flatten() for name, parameter in model.trainable.items() if "lora_A" in name]
    )
    assert theirs.abs().max().item() == pytest.approx(bound, rel=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_is_read_back_and_is_what_the_model_computes_with(method: str, base: Path) -> None:
    model = tunable(base, method)
    before = logits(model.model)
    values = moved(model)
    assert bits(model.read()) == bits(values)
    assert (logits(model.model) - before).abs().max() > 1e-3
    assert not set(map(id, model.read().values())) & set(map(id, model.trainable.values()))


@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_the_delivered_adapter_to_the_same_logits_merged_too(
    method: str, base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = tunable(base, method)
    values = moved(model)
    expected = logits(model.model)
    peft = PeftSettings(**METHODS[method])
    save_adapter(values, folder=tmp_path / "adapter", base=base, peft=peft, name="org/base")
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    )
    loaded = PeftModel.from_pretrained(fresh(base), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora", "head in full"])
def test_the_delivered_files_have_the_same_bytes_each_time(method: str, base: Path, tmp_path: Path) -> None:
    values = moved(tunable(base, method))
    peft = PeftSettings(**METHODS[method])
    for name in ("one", "two"):
        save_adapter(values, folder=tmp_path / name, base=base, peft=peft, name="base")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_the_skeleton_has_the_manifest_of_the_model(method: str, base: Path) -> None:
    found = skeleton(base, PeftSettings(**METHODS[method]))
    assert found.manifest == tunable(base, method).manifest
    assert {parameter.device.type for parameter in found.model.parameters()} == {"meta"}


def test_the_base_is_frozen_and_the_adapter_is_float32_on_a_bfloat16_base(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    settings = ModelSettings(model_name_or_path=str(folder), dtype="bfloat16")
    model = TunableModel(load_base(settings, folder=folder).model, PeftSettings(r=2))
    assert {spec.dtype for spec in model.manifest.values()} == {"float32"}
    frozen = [name for name, parameter in model.model.named_parameters() if not parameter.requires_grad]
    assert len(frozen) + len(model.trainable) == sum(1 for _ in model.model.named_parameters())
    assert not any("lora" in name for name in frozen)


@pytest.mark.parametrize("targets", [["q_prj"], "no_such_module", ["input_layernorm"]])
def test_targets_that_the_model_does_not_have_are_refused_with_those_it_has(targets: Any, base: Path) -> None:
    with pytest.raises(ModelError) as caught:
        TunableModel(fresh(base), PeftSettings(target_modules=targets))
    assert caught.value.code == "PEFT_TARGET"
    assert "q_proj" in caught.value.fix


def test_a_base_with_an_adapter_on_it_already_is_refused(base: Path) -> None:
    model = fresh(base)
    TunableModel(model, PeftSettings(r=2))
    with pytest.raises(ModelError) as caught:
        TunableModel(model, PeftSettings(r=2))
    assert caught.value.code == "PEFT_TARGET"


def test_attaching_leaves_the_global_generators_as_they_were(base: Path) -> None:
    model = fresh(base)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    TunableModel(model, PeftSettings(r=2)).initial(5)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
