"""A frozen low-rank branch beside an adapter: what rules add to the base without touching its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

_PREFIX = "folded/"
_BRANCHES = "_fedllm_folded"


def set_folded(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let a model compute with W + s L R in place of W wherever LoRA sits, or with W again.

    The base's weights are left alone: a branch is exact in whatever dtype they are stored, and many parties can share
    them. Gradients go through the branch to what comes before it, and none to the branch.

    Args:
        model: From `peft`, with LoRA on it.
        tensors: `folded/SITE.left` (d, R) and `folded/SITE.right` (R, k) among others; what is not there has no branch.
    """
    for _, handle in getattr(model, _BRANCHES, ()):
        handle.remove()
    branches = []
    for name in sorted(tensors):
        if name.startswith(_PREFIX) and name.endswith(".left"):
            site = name.removeprefix(_PREFIX).removesuffix(".left")
            layer = model.get_submodule(site)
            branch = _Branch(layer, tensors[name], tensors[f"{_PREFIX}{site}.right"])
            branches.append((branch, layer.base_layer.register_forward_hook(branch)))
    setattr(model, _BRANCHES, tuple(branches))


@contextmanager
def without_folded(model: Any) -> Iterator[None]:
    """Let a model compute with W alone, for as long as the context lasts.

    Args:
        model: As for `set_folded`.
    """
    branches = [branch for branch, _ in getattr(model, _BRANCHES, ())]
    for branch in branches:
        branch.active = False
    try:
        yield
    finally:
        for branch in branches:
            branch.active = True


class _Branch:
    """A forward hook on the layer under LoRA: adds s L R x, as PEFT adds s B A x."""

    def __init__(self, layer: Any, left: torch.Tensor, right: torch.Tensor) -> None:
        device = next(layer.base_layer.parameters()).device
        self._left, self._right = left.detach().to(device, copy=True), right.detach().to(device, copy=True)
        self._scale = float(layer.scaling["default"])
        self.active = True

    def __call__(self, layer: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if not self.active:
            return output
        (x, *_) = args
        if isinstance(layer, torch.nn.Embedding):
            inner = torch.nn.functional.embedding(x, self._right.T)
        else:
            inner = torch.nn.functional.linear(x.to(self._right.dtype), self._right)
        added = torch.nn.functional.linear(inner, self._left) * self._scale
        return (output + added).to(output.dtype)
