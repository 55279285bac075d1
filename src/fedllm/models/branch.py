"""A frozen low-rank branch beside an adapter: what is added to the base without touching its weights.

It stands under LoRA's layers, where rules for LoRA's factors put it, and beside layers of an emulator's middle, where
the owner's corrections go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedllm.models.blocks import cuts_of, stacks
from fedllm.wire.payload import Manifest, TensorSpec

_PREFIX = "folded/"
_BRANCHES = "_fedllm_folded"


def set_folded(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let a model compute with W + s L R in place of W at these sites, or with W again; s is LoRA's scale.

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
            under = getattr(layer, "base_layer", layer)
            device = next(under.parameters()).device
            factors = (tensors[name], tensors[f"{_PREFIX}{site}.right"])
            left, right = (factor.detach().to(device, copy=True) for factor in factors)
            branch = _Branch(site, left, right, scale_of(model))
            branches.append((branch, under.register_forward_hook(branch)))
    setattr(model, _BRANCHES, tuple(branches))


def scale_of(model: Any) -> float:
    """Return LoRA's scale s, which all of a model's layers share.

    Args:
        model: From `peft`, with LoRA on it.
    """
    scales = (getattr(module, "scaling", None) for module in model.modules())
    return next(float(found["default"]) for found in scales if isinstance(found, dict) and "default" in found)


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


@contextmanager
def trained_branches(model: Any) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the factors of a model's branches as parameters, by their tensors' names, for as long as the context lasts.

    Args:
        model: As for `set_folded`, with branches.
    """
    branches = [branch for branch, _ in getattr(model, _BRANCHES, ())]
    found: dict[str, nn.Parameter] = {}
    for branch in branches:
        branch.left, branch.right = nn.Parameter(branch.left), nn.Parameter(branch.right)
        found |= {f"{_PREFIX}{branch.site}.left": branch.left, f"{_PREFIX}{branch.site}.right": branch.right}
    try:
        yield found
    finally:
        for branch in branches:
            branch.left, branch.right = branch.left.detach(), branch.right.detach()


def middle_layers(model: Any) -> dict[str, nn.Module]:
    """Return the linear layers of the middle of an emulator's package, by their paths in the model.

    Args:
        model: A package's model, tuned or not.
    """
    from transformers.pytorch_utils import Conv1D

    find = getattr(model, "get_base_model", None)
    inner = find() if find else model
    head = next(name for name, module in model.named_modules() if module is inner)
    found: dict[str, nn.Module] = {}
    for path, cut in cuts_of(inner.config).items():
        blocks = stacks(inner)[path]
        for index in range(cut.bottom, len(blocks) - cut.top):
            for name, module in blocks[index].named_modules():
                if isinstance(module, nn.Linear | Conv1D):
                    found[".".join(part for part in (head, path, str(index), name) if part)] = module
    return found


def middle_branches(model: Any, rank: int) -> Manifest:
    """Return the tensors of branches beside all linear layers of a package's middle.

    Args:
        model: A package's model, tuned or not.
        rank: Columns of L; fewer where a layer has fewer rows or columns.
    """
    found: Manifest = {}
    for site, layer in middle_layers(model).items():
        rows, columns = rows_and_columns(layer)
        size = min(rank, rows, columns)
        found[f"{_PREFIX}{site}.left"] = TensorSpec(dtype="float32", shape=[rows, size])
        found[f"{_PREFIX}{site}.right"] = TensorSpec(dtype="float32", shape=[size, columns])
    return found


def rows_and_columns(layer: Any) -> tuple[int, int]:
    """Return how many values come out of a linear layer, and how many go in.

    Args:
        layer: A linear layer, or a Conv1D of transformers, which stores its weight turned.
    """
    if hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    return layer.weight.shape[1], layer.weight.shape[0]


class _Branch:
    """A forward hook on a layer: adds s L R x, as PEFT adds s B A x."""

    def __init__(self, site: str, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
        self.site, self.left, self.right = site, left, right
        self._scale = scale
        self.active = True

    def __call__(self, layer: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if not self.active:
            return output
        (x, *_) = args
        if isinstance(layer, torch.nn.Embedding):
            inner = torch.nn.functional.embedding(x, self.right.T)
        else:
            inner = torch.nn.functional.linear(x.to(self.right.dtype), self.right)
        added = torch.nn.functional.linear(inner, self.left) * self._scale
        return (output + added).to(output.dtype)
