"""Bottleneck adapters: a small network with a residual connection after each block of a transformer."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from fedllm.models.blocks import in_tuned, stacks, tuned_prefixes

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


class Bottleneck(nn.Module):
    """h + up(gelu(down(h))); zero in `up` makes it the identity.

    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1; Pfeiffer et al. 2021, arXiv:2005.00247, keep one of the
    two. Differs: it stands after the block's own residual connection, which every family has in the same place.
    """

    def __init__(self, width: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, size, device=device, dtype=torch.float32)
        self.up = nn.Linear(size, width, device=device, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.active = True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden states, changed; any shape that ends in `width`."""
        change: torch.Tensor = self.up(nn.functional.gelu(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + change.to(hidden.dtype)


def add_bottlenecks(model: nn.Module, *, size: int, placement: str) -> int:
    """Put an adapter after each block of a model that may be tuned, and return how many these are.

    Args:
        model: A transformer of any family.
        size: Width of the adapter's middle.
        placement: `pfeiffer`: after the block; `houlsby`: also after the attention within it.
    """
    prefixes = tuned_prefixes(model)
    places = {f"{path}.{i}.": block for path, found in stacks(model).items() for i, block in enumerate(found)}
    blocks = [block for place, block in places.items() if in_tuned(place, prefixes)]
    width = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
    for block in blocks:
        _adapt(block, width, size)
        attention = next((part for part in block.modules() if _is_attention(part, block)), None)
        if placement == "houlsby" and attention is not None:
            _adapt(attention, width, size)
    return len(blocks)


def bottlenecks(model: nn.Module) -> list[Bottleneck]:
    """Return the adapters in a model.

    Args:
        model: Any model.
    """
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


def _is_attention(part: nn.Module, block: nn.Module) -> bool:
    return part is not block and bool(_ATTENTION.search(type(part).__name__))


def _adapt(module: nn.Module, width: int, size: int) -> None:
    adapter = Bottleneck(width, size, next(module.parameters()).device)
    module.add_module("bottleneck", adapter)

    def adapted(_: nn.Module, inputs: Any, output: Any) -> Any:
        if not adapter.active:
            return output
        if isinstance(output, tuple):
            return (adapter(output[0]), *output[1:])
        return adapter(output)

    module.register_forward_hook(adapted)
