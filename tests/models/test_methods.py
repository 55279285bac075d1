"""Tuning methods: settings, first values, what they compute before and after training, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import bits, save_base

from fedllm.errors import ConfigError, ModelError
from fedllm.models.adalora import budget, kept_values, penalty
from fedllm.models.adapter import TunableModel, skeleton
from fedllm.models.bottleneck import bottlenecks
from fedllm.models.deliver import load_adapter, merged, save_adapter
from fedllm.models.load import load_base
from fedllm.models.loss import target_losses
from fedllm.models.settings import DEFAULTS, MERGING_TYPES, PROMPT_TYPES, ModelSettings, PeftSettings

METHODS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2},
    "VERA": {"r": 8},
    "IA3": {},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "prefix, projected": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "prefix_projection": True},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "LN_TUNING": {},
    "BOTTLENECK": {"bottleneck_size": 4},
    "houlsby": {"peft_type": "BOTTLENECK", "bottleneck_size": 4, "placement": "houlsby"},
    "FULL": {},
}
IDS = torch.tensor([[3, 40, 80, 120, 60, 7], [9, 9, 30, 200, 11, 2]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


def settings(method: str) -> PeftSettings:
    return PeftSettings.model_validate({"peft_type": method} | METHODS[method])


def fresh(base: Path, **model: Any) -> Any:
    return load_base(ModelSettings(model_name_or_path=str(base), **model), folder=base).model


def losses(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return target_losses(model.eval(), BATCH)[0]


def trained(base: Path, method: str) -> TunableModel:
    tunable = TunableModel(fresh(base), settings(method))
    tunable.write(tunable.initial(3))
    optimizer = torch.optim.AdamW(tunable.trainable.values(), lr=0.02)
    tunable.model.train()
    for _ in range(2):
        target_losses(tunable.model, BATCH)[0].mean().backward()
        assert all(parameter.grad is not None for parameter in tunable.trainable.values())
        optimizer.step()
        optimizer.zero_grad()
    return tunable


@pytest.mark.parametrize("method", METHODS)
def test_the_first_values_are_a_function_of_the_seed_alone(method: str, base: Path) -> None:
    tunable = TunableModel(fresh(base), settings(method))
    first = tunable.initial(7)
    torch.rand(13)
    tunable.write({name: tensor + 1 for name, tensor in first.items()})
    assert bits(tunable.initial(7)) == bits(first) == bits(TunableModel(fresh(base), settings(method)).initial(7))
    drawn = {name for name, tensor in tunable.initial(8).items() if not torch.equal(tensor, first[name])}
    assert bool(drawn) == (method not in ("VERA", "IA3", "LN_TUNING", "FULL"))


@pytest.mark.parametrize("method", [name for name in METHODS if settings(name).peft_type not in PROMPT_TYPES])
def test_at_the_start_the_model_says_what_the_base_says(method: str, base: Path) -> None:
    expected = losses(fresh(base))
    tunable = TunableModel(fresh(base), settings(method))
    tunable.write(tunable.initial(3))
    torch.testing.assert_close(losses(tunable.model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_untuned_is_the_bare_base_and_afterwards_all_is_as_it_was(method: str, base: Path) -> None:
    expected = losses(fresh(base))
    tunable = trained(base, method)
    tuned, values = losses(tunable.model), tunable.read()
    assert (tuned - expected).abs().max() > 1e-3
    with tunable.untuned() as bare:
        torch.testing.assert_close(losses(bare), expected, atol=1e-5, rtol=1e-5)
    assert bits(tunable.read()) == bits(values)
    torch.testing.assert_close(losses(tunable.model), tuned, atol=0, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_delivered_computes_the_same_loaded_and_merged(method: str, base: Path, tmp_path: Path) -> None:
    tunable = trained(base, method)
    expected = losses(tunable.model)
    folder = tmp_path / "adapter"
    save_adapter(tunable.read(), folder=folder, base=base, peft=settings(method), name="org/base")
    loaded = load_adapter(fresh(base), folder)
    torch.testing.assert_close(losses(loaded), expected, atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    if settings(method).peft_type in MERGING_TYPES:
        merged(fresh(base), folder).save_pretrained(tmp_path / "merged")
        from transformers import AutoModelForCausalLM

        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(losses(plain), expected, atol=1e-4, rtol=1e-4)
    else:
        with pytest.raises(ConfigError) as caught:
            merged(fresh(base), folder)
        assert caught.value.code == "BAD_COMBINATION"


@pytest.mark.parametrize("method", ["P_TUNING", "prefix, projected", "FULL"])
def test_the_delivered_files_have_the_same_bytes_each_time(method: str, base: Path, tmp_path: Path) -> None:
    values = trained(base, method).read()
    for name in ("one", "two"):
        save_adapter(values, folder=tmp_path / name, base=base, peft=settings(method), name="base")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_the_loss_behind_virtual_tokens_is_pefts_own(method: str, base: Path) -> None:
    model = trained(base, method).model
    # With labels of its own PEFT would have the last virtual token foretell the first word.
    labels = torch.cat([torch.full((2, 1), -100), IDS[:, 1:]], dim=1)
    with torch.no_grad():
        theirs = model(**BATCH | {"labels": labels}).loss
    torch.testing.assert_close(losses(model).mean(), theirs, atol=1e-5, rtol=1e-5)


def test_an_adapter_on_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    values = trained(base, "BOTTLENECK").read()
    save_adapter(values, folder=tmp_path / "adapter", base=base, peft=settings("BOTTLENECK"), name="base")
    other = save_base(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(ModelError) as caught:
        load_adapter(fresh(other), tmp_path / "adapter")
    assert caught.value.code == "PEFT_TARGET"


@pytest.mark.parametrize(("placement", "count"), [("pfeiffer", 2), ("houlsby", 4)])
def test_there_is_an_adapter_after_each_block_and_perhaps_after_its_attention(
    placement: Any, count: int, base: Path
) -> None:
    peft = PeftSettings(peft_type="BOTTLENECK", bottleneck_size=4, placement=placement)
    tunable = TunableModel(fresh(base), peft)
    assert len(bottlenecks(tunable.model)) == count
    assert tunable.num_trainable() == count * (32 * 4 + 4 + 4 * 32 + 32)


def test_bitfit_trains_the_biases_and_nothing_else(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", attention_bias=True)
    tunable = TunableModel(fresh(base), PeftSettings(peft_type="BITFIT"))
    assert {name.rsplit(".", 1)[1] for name in tunable.manifest} == {"bias"}
    assert len(tunable.manifest) == 2 * 4


def test_a_model_without_biases_is_refused_for_bitfit(base: Path) -> None:
    with pytest.raises(ModelError) as caught:
        skeleton(base, PeftSettings(peft_type="BITFIT"))
    assert (caught.value.code, "biases" in caught.value.what) == ("PEFT_TARGET", True)


@pytest.mark.parametrize("method", ["BOTTLENECK", "FULL"])
def test_one_base_carries_one_method(method: str, base: Path) -> None:
    model = fresh(base)
    TunableModel(model, settings(method))
    with pytest.raises(ModelError) as caught:
        TunableModel(model, settings(method))
    assert "already" in caught.value.what


@pytest.mark.parametrize("method", ["LN_TUNING", "FULL"])
def test_nothing_is_trained_in_bfloat16(method: str, base: Path) -> None:
    with pytest.raises(ModelError) as caught:
        TunableModel(fresh(base, dtype="bfloat16"), settings(method))
    assert caught.value.where == "model.dtype"


@pytest.mark.parametrize("method", DEFAULTS)
def test_each_method_fills_in_its_own_settings_and_no_other(method: str) -> None:
    peft = PeftSettings.model_validate({"peft_type": method})
    given = {key for key, value in peft.model_dump(exclude={"peft_type"}).items() if value is not None}
    assert given == {key for key, value in DEFAULTS[method].items() if value is not None}
    assert PeftSettings.model_validate(peft.model_dump()) == peft


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "IA3", "r": 4}, "r has no effect with IA3"),
        ({"peft_type": "FULL", "modules_to_save": ["lm_head"]}, "modules_to_save has no effect"),
        ({"peft_type": "ADALORA", "init_r": 2, "target_r": 4}, "only shrink"),
        ({"peft_type": "PREFIX_TUNING", "encoder_hidden_size": 8}, "prefix_projection"),
        ({"peft_type": "IA3", "feedforward_modules": ["down_proj"]}, "needs target_modules"),
        ({"peft_type": "LORAX"}, "peft_type"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PeftSettings.model_validate(values)
    assert words in str(caught.value)


def test_the_penalty_is_zero_for_orthogonal_factors_and_by_hand_for_others() -> None:
    turned = {"x.lora_A.default": torch.eye(2, 5), "x.lora_B.default": torch.eye(5, 2)}
    assert penalty(turned, 0.5).item() == 0
    # |diag(4, 4) - I| = 3 sqrt(2) for A, 0 for B: their mean, halved.
    doubled = turned | {"x.lora_A.default": 2 * torch.eye(2, 5)}
    assert penalty(doubled, 0.5).item() == pytest.approx(0.5 * 3 * 2**0.5 / 2)


def test_the_budget_falls_along_a_cube_between_tinit_and_tfinal() -> None:
    peft = PeftSettings(peft_type="ADALORA", init_r=10, target_r=2, tinit=1, tfinal=2)
    found = [budget(number, 10, peft) for number in range(1, 11)]
    assert found[:2] == [10, 10]
    assert found[2:8] == [pytest.approx(2 + 8 * ((8 - number) / 6) ** 3) for number in range(3, 9)]
    assert found[7:] == [2, 2, 2]
    assert budget(1, 1, PeftSettings(peft_type="ADALORA")) == 12


def test_the_largest_singular_values_stay_over_all_sites_together() -> None:
    state = {
        "a.lora_E.default": torch.tensor([[3.0], [-0.1], [0.2]]),
        "b.lora_E.default": torch.tensor([[-5.0], [4.0], [0.0]]),
        "b.lora_A.default": torch.ones(3, 2),
    }
    kept = kept_values(state, 1.5)
    assert {name: mask.flatten().tolist() for name, mask in kept.items()} == {
        "a.lora_E.default": [1, 0, 0],
        "b.lora_E.default": [1, 1, 0],
    }


def test_ranks_are_cut_before_and_after_local_training(base: Path) -> None:
    tunable = TunableModel(fresh(base), settings("ADALORA"))
    values = {name: torch.ones_like(tensor) for name, tensor in tunable.initial(1).items()}
    tunable.write(values)
    ranks = [name for name in tunable.manifest if "lora_E" in name]
    with tunable.shrunk(4, 4):
        assert sum(int(tunable.read()[name].sum()) for name in ranks) == 2 * len(ranks)
        tunable.write(values)
    assert sum(int(tunable.read()[name].sum()) for name in ranks) == 2 * len(ranks)
    with tunable.shrunk(1, 4):
        pass
    assert budget(1, 4, settings("ADALORA")) == 4
