"""What stands beside an adapter computes as an adapter of higher rank does, on every kind of layer, and goes again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedllm.aggregate.folded import FOLDED, complete
from fedllm.aggregate.lora import sites
from fedllm.models.adapter import TunableModel
from fedllm.models.branch import set_folded
from fedllm.models.fresh import fresh_factors
from fedllm.models.settings import PeftSettings
from fedllm.runtime.delivery import of_rank

Tensors = dict[str, torch.Tensor]
IDS = torch.tensor([[3, 4, 5, 6]])


def base(family: str, dtype: torch.dtype = torch.float32) -> Any:
    sizes: dict[str, Any]
    if family == "gpt2":
        sizes = {"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        model: Any = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    else:
        sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "tie_word_embeddings": False}
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model.to(dtype).eval().requires_grad_(False)


def state_of(model: TunableModel, *, columns: int = 5) -> Tensors:
    draw = torch.Generator().manual_seed(2)
    state = {name: torch.randn(spec.shape, generator=draw) * 0.3 for name, spec in model.manifest.items()}
    for site, (left, right) in sites(model.manifest).items():
        tall, wide = model.manifest[left].shape[0], model.manifest[right].shape[1]
        state[f"{FOLDED}{site}.left"] = torch.randn(tall, columns, generator=draw) * 0.3
        state[f"{FOLDED}{site}.right"] = torch.randn(columns, wide, generator=draw) * 0.3
    return state


def logits(model: TunableModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.model(input_ids=IDS).logits.float()
    return found


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"]}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
}


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("case", CASES)
def test_the_branch_computes_as_the_adapter_of_higher_rank(case: str) -> None:
    family, options = CASES[case]
    peft = PeftSettings(r=3, lora_alpha=7, **options)
    model = TunableModel(base(family), peft)
    state = state_of(model)
    model.write(state)
    whole = complete(state)
    wide = TunableModel(base(family), of_rank(peft, 8))
    wide.write(whole)
    assert (logits(model) - logits(wide)).abs().max() < 1e-4
    plain = {name: tensor for name, tensor in state.items() if not name.startswith(FOLDED)}
    model.write(plain)
    assert (logits(model) - logits(wide)).abs().max() > 1e-2
    fresh = TunableModel(base(family), peft)
    fresh.write(plain)
    assert torch.equal(logits(model), logits(fresh))


def test_the_base_alone_has_no_branch() -> None:
    peft = PeftSettings(r=3, target_modules=["q_proj"])
    model, untouched = TunableModel(base("llama"), peft), base("llama")
    model.write(state_of(model))
    before = logits(model)
    with model.untuned() as bare, torch.no_grad():
        assert torch.equal(bare(input_ids=IDS).logits, untouched(input_ids=IDS).logits)
    assert torch.equal(logits(model), before)
    set_folded(model.model, {})
    with model.model.disable_adapter(), torch.no_grad():
        assert torch.equal(logits(model), untouched(input_ids=IDS).logits)


def test_gradients_pass_through_the_branch_and_not_into_it() -> None:
    peft = PeftSettings(r=3, lora_alpha=3, target_modules=["q_proj"])
    narrow = TunableModel(base("llama"), peft)
    state = state_of(narrow)
    narrow.write(state)
    wide = TunableModel(base("llama"), of_rank(peft, 8))
    wide.write(complete(state))
    for model in (narrow, wide):
        model.model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in narrow.trainable.items():
        other = wide.trainable[name].grad
        assert parameter.grad is not None and other is not None
        assert torch.allclose(parameter.grad, other[:3] if "lora_A" in name else other[:, :3], atol=1e-5)


def test_on_a_bfloat16_base_small_additions_are_not_lost() -> None:
    """Added to bfloat16 weights most of them would be: half a step of a weight near 0.3 is 0.0005."""
    peft = PeftSettings(r=2, lora_alpha=2, target_modules=["q_proj"])
    model = TunableModel(base("llama", torch.bfloat16), peft)
    state = state_of(model, columns=2)
    small = {name: tensor * (1e-4 if name.endswith(".left") else 1) for name, tensor in state.items()}
    site, (left, right) = next(iter(sites(model.manifest).items()))
    layer = model.model.get_submodule(site)
    model.write({name: torch.zeros_like(tensor) for name, tensor in small.items()} | folded_of(small))
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    added = small[f"{FOLDED}{site}.left"] @ small[f"{FOLDED}{site}.right"]
    weight = layer.base_layer.weight.data
    rounded = (weight.float() + added).to(torch.bfloat16).float() - weight.float()
    assert (rounded - added).norm() > 0.5 * added.norm()
    hook = next(iter(layer.base_layer._forward_hooks.values()))
    found = hook(layer.base_layer, (x,), torch.zeros(1, 16))
    assert torch.allclose(found, (added @ torch.ones(16))[None], rtol=1e-3)
    assert left in model.manifest and right in model.manifest


def folded_of(state: Tensors) -> Tensors:
    return {name: tensor for name, tensor in state.items() if name.startswith(FOLDED)}


def test_fresh_factors_are_those_of_the_start_drawn_again() -> None:
    model = TunableModel(base("llama"), PeftSettings(r=3, target_modules=["q_proj", "embed_tokens"]))
    first, again = fresh_factors(model.manifest, 5, 0), fresh_factors(model.manifest, 5, 1)
    assert all(torch.equal(first[name], tensor) for name, tensor in model.initial(5).items())
    for name, tensor in first.items():
        assert tensor.shape == again[name].shape
        drawn = ".lora_A." in name or "lora_embedding_B" in name
        assert torch.equal(tensor, again[name]) != drawn
        assert bool(tensor.any()) == drawn


@pytest.mark.parametrize("use_rslora", [False, True])
def test_another_rank_has_the_same_scale(use_rslora: bool) -> None:
    peft = PeftSettings(r=4, lora_alpha=10, use_rslora=use_rslora)

    def scale(settings: PeftSettings) -> float:
        return settings.lora_alpha / (settings.r**0.5 if use_rslora else settings.r)

    assert scale(of_rank(peft, 37)) == pytest.approx(scale(peft), rel=1e-12)
    assert of_rank(peft, 4) == peft
