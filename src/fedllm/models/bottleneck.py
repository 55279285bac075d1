"""Bottleneck adapters: a small network with a residual connection after each block of a transformer."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

_BLOCK = re.compile(r"(Layer|Block)$")
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
    """Put an adapter after each block of a model, and return how many blocks there are.

    Args:
        model: A transformer of any family.
        size: Width of the adapter's middle.
        placement: `pfeiffer`: after the block; `houlsby`: also after the attention within it.
    """
    blocks, width = _blocks(model), int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
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


def _blocks(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or not _BLOCK.search(type(module[0]).__name__):
            continue
        # T5 keeps the parts of a block in a list of the same kind.
        if not any(module is part for block in found for part in block.modules()):
            found += list(module)
    return found


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
