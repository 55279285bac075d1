"""What a thief does to a stolen model's weights; each function returns the weights after it.

Shapes: R and K rows and columns of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fedllm.data.batches import collate
from fedllm.models.adapter import TunableModel
from fedllm.models.loss import target_losses
from fedllm.models.settings import PeftSettings
from fedllm.ownership.claims import DRAWN, Claim, new_bits, new_secret
from fedllm.ownership.marks import Mark, mark_sites
from fedllm.ownership.settings import OwnershipSettings
from fedllm.runtime.site import Site
from fedllm.seeds import global_generators_kept, stream, torch_generator

Weights = dict[str, torch.Tensor]
BATCH, RATE = 16, 3e-3
# Norm -> the linear layers that read it, in a block of a Llama.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def pruned(own: Weights, base: Weights, names: Sequence[str], share: float) -> Weights:
    """Return the weights with the smallest part of each layer's change set back to the base's."""
    found = dict(own)
    for name in names:
        delta = own[name] - base[name]
        limit = delta.abs().flatten().kthvalue(max(1, int(share * delta.numel()))).values
        found[name] = base[name] + torch.where(delta.abs() > limit, delta, 0.0)
    return found


def rounded(own: Weights) -> Weights:
    """Return the weights as bfloat16 holds them."""
    return {name: value.bfloat16().float() for name, value in own.items()}


def quantised(own: Weights, names: Sequence[str], bits: int) -> Weights:
    """Return the weights with each row of each layer rounded to a symmetric grid."""
    found, top = dict(own), 2 ** (bits - 1) - 1
    for name in names:
        step = own[name].abs().amax(1, keepdim=True) / top
        found[name] = (own[name] / step).round().clamp(-top, top) * step
    return found


def merged_by(own: Weights, base: Weights, share: float) -> Weights:
    """Return the weighted mean of the model and its base."""
    return {name: base[name] + share * (value - base[name]) for name, value in own.items()}


def truncated(own: Weights, base: Weights, names: Sequence[str], rank: int) -> Weights:
    """Return the weights with each layer's change cut to its largest singular directions."""
    found = dict(own)
    for name in names:
        left, values, right = torch.linalg.svd(own[name] - base[name], full_matrices=False)
        found[name] = base[name] + (left[:, :rank] * values[:rank]) @ right[:rank]
    return found


def with_noise(own: Weights, base: Weights, names: Sequence[str], times: float) -> Weights:
    """Return the weights with Gaussian noise, in each layer so many times as long as its change."""
    found = dict(own)
    for name in names:
        draw = torch.randn(own[name].shape, generator=torch_generator(0, "noise", name))
        found[name] = own[name] + draw * (times * (own[name] - base[name]).norm() / draw.norm())
    return found


def folded(own: Weights, base: Weights, *, seed: int) -> Weights:
    """Return a model that computes the same with all norms' scales 1: each is multiplied into what reads it.

    The last norm is before the tied head, so it stays.
    """
    found = dict(own)
    for name in own:
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        for reader in READERS.get(norm, ()):
            linear = f"{block}.{reader}.weight"
            found[linear] = found[linear] * own[name]
        if norm in READERS:
            found[name] = torch.ones_like(own[name])
    return found


def permuted(own: Weights) -> Weights:
    """Return a model that computes the same with the MLPs' neurons in another order."""
    found = dict(own)
    for name in own:
        if name.endswith("mlp.up_proj.weight"):
            block = name.removesuffix("up_proj.weight")
            order = torch.from_numpy(stream(0, "order", name).permutation(len(own[name])))
            for part in ("up_proj", "gate_proj"):
                found[f"{block}{part}.weight"] = own[f"{block}{part}.weight"][order]
            found[f"{block}down_proj.weight"] = own[f"{block}down_proj.weight"][:, order]
    return found


def tuned(site: Site, own: Weights, other: Sequence[Any], *, epochs: int, times: float = 0.0) -> Weights:
    """Return the model after LoRA tuning on other data; with `times`, a mark of the thief's goes in too."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with global_generators_kept():
        model = AutoModelForCausalLM.from_pretrained(site.folder)
    model.load_state_dict(own, strict=False)
    model.requires_grad_(False)
    tunable = TunableModel(model, PeftSettings(r=16, lora_alpha=16))
    first = tunable.initial(1)
    tunable.write(first)
    pull = _thief(tunable, first, times) if times else lambda rate: None
    steps = epochs * math.ceil(len(other) / BATCH)
    optimizer = torch.optim.AdamW(tunable.trainable.values(), lr=RATE, weight_decay=0.0)
    order = [stream(0, "thief", epoch).permutation(len(other)) for epoch in range(epochs)]
    rows = [int(index) for epoch in order for index in epoch]
    for step in range(steps):
        batch = [other[index] for index in rows[step * BATCH : (step + 1) * BATCH]]
        tokens = collate(batch, pad_id=site.base.tokenizer.pad_token_id, packing=False, max_length=128)
        target_losses(tunable.model, tokens)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(tunable.trainable.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        pull(RATE)
        optimizer.step()
        optimizer.zero_grad()
    assert isinstance(tunable.model, PeftModel)
    plain = tunable.model.merge_and_unload()
    return {name: value.detach().clone() for name, value in plain.state_dict().items() if name in own}


def overwritten(site: Site, own: Weights, other: Sequence[Any], *, times: float) -> Weights:
    """Return the model after an epoch on other data, in which a thief embeds a mark of its own."""
    return tuned(site, own, other, epochs=1, times=times)


def _thief(tunable: TunableModel, first: Weights, times: float) -> Any:
    claim = Claim(
        form=DRAWN,
        party="thief",
        job_digest="0" * 64,
        base_digest="0" * 64,
        carrier="product",
        sites=mark_sites(tunable, "product"),
        key_seed=new_secret(),
        bits=new_bits(32),
        threshold=1e-6,
        salt=new_secret(),
    )
    settings = OwnershipSettings(carrier="product", claimants=["thief"], margin=0.1 * times)
    return Mark(claim, tunable, first).pull(settings)
