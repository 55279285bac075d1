"""What takes the mean's place where the server looks at each update: rules for LoRA's products, and robust ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from fedllm.aggregate.lora import truncated_product
from fedllm.aggregate.robust import Update, weighted_sum
from fedllm.aggregate.rules import LoraRule

Tensors = dict[str, torch.Tensor]
_Factors = Callable[[Mapping[str, torch.Tensor], Sequence[Mapping[str, torch.Tensor]], Sequence[float]], Tensors]
_FACTORS: dict[LoraRule, _Factors] = {"FlexLoRA": truncated_product}


def combined(rule: LoraRule, before: Mapping[str, torch.Tensor], updates: Sequence[Update]) -> Tensors:
    """Return the change of the global state by a rule that needs each update.

    What is no LoRA factor moves by the weighted mean.

    Args:
        rule: The rule.
        before: The global state.
        updates: One per party, each of its own slots.
    """
    shares = [update.weight / sum(other.weight for other in updates) for update in updates]
    factors = _FACTORS[rule](before, [update.tensors for update in updates], shares)
    others = [replace(update, tensors=_without(update.tensors, factors)) for update in updates]
    return weighted_sum(others, shares) | factors


def _without(tensors: Mapping[str, torch.Tensor], names: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}
