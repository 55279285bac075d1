"""What takes the mean's place where the server looks at each update: rules for LoRA's products, and robust ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fedllm.aggregate.folded import Pair, folded_with, product_norm, residual, split, stacked
from fedllm.aggregate.lora import sites, truncated_product
from fedllm.aggregate.robust import Update, weighted_sum
from fedllm.aggregate.rules import RULES, LoraRule

Tensors = dict[str, torch.Tensor]
_Updates = Sequence[Mapping[str, torch.Tensor]]
_Factors = Callable[[Mapping[str, torch.Tensor], _Updates, Sequence[float]], Tensors]
_Added = Callable[[Mapping[str, torch.Tensor], _Updates, Sequence[float]], dict[str, Pair]]
# Rule -> the change of the factors, and what is added beside them. Factors that are not named here move by the mean.
_FACTORS: dict[LoraRule, _Factors] = {"FlexLoRA": truncated_product}
_ADDED: dict[LoraRule, _Added] = {"FedEx-LoRA": residual, "FLoRA": stacked}
EACH = frozenset([*_FACTORS, *_ADDED])


@dataclass(frozen=True)
class Combined:
    """What a rule makes of all updates: the change of the adapter, and what stands beside it then."""

    change: Tensors
    folded: Tensors
    added_norm: float


def combined(rule: LoraRule, before: Mapping[str, torch.Tensor], updates: Sequence[Update]) -> Combined:
    """Return the next global state by a rule that needs each update.

    What is no LoRA factor moves by the weighted mean.

    Args:
        rule: The rule.
        before: The global state.
        updates: One per party, each of its own slots.
    """
    adapter, folded = split(before)
    shares = [update.weight / sum(other.weight for other in updates) for update in updates]
    each = [update.tensors for update in updates]
    added = _ADDED[rule](adapter, each, shares) if rule in _ADDED else {}
    factors = _FACTORS[rule](adapter, each, shares) if rule in _FACTORS else {}
    in_sites = {name for pair in sites(adapter).values() for name in pair}
    # Factors that are drawn afresh do not move, and may differ in shape from party to party.
    averaged = set() if factors or RULES[rule].starts_afresh else in_sites
    others = [replace(update, tensors=_without(update.tensors, in_sites - averaged)) for update in updates]
    return Combined(weighted_sum(others, shares) | factors, folded_with(folded, added), product_norm(added))


def _without(tensors: Mapping[str, torch.Tensor], names: Collection[str]) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}
