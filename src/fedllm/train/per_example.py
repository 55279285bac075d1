"""The gradient of each example by itself. Shapes: R examples; a parameter's gradients are (R, *its shape).

Two ways with one result: all of a batch at once by `torch.func`, where the model allows it, or one after another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from fedllm.data.batches import IGNORED, collate
from fedllm.data.tokens import TokenisedExample
from fedllm.errors import ModelError
from fedllm.models.loss import target_losses
from fedllm.models.quiet import no_look_for_padding
from fedllm.seeds import PROCESS_STATE, torch_generator

Gradients = dict[str, torch.Tensor]
_Parameters = dict[str, nn.Parameter]
# (examples) -> the gradients of each one's loss, the mean over its own targets.
PerExample = Callable[[Sequence[TokenisedExample]], Gradients]

_TOLERANCE = 1e-4
# Of a parameter whose gradient is next to nothing, only rounding errors are left to compare.
_FLOOR = 1e-6
_LENGTHS = (7, 5)
# What torch.func and models raise where the two do not go together.
_MISFITS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError, UserWarning)


def at_once(model: Any, parameters: _Parameters, *, pad_id: int) -> PerExample:
    """Return the way by `torch.func.vmap`, for causal language models.

    No attention mask is given: texts are padded on the right, so that no target sees the padding.

    Args:
        model: The model.
        parameters: What is trained, by name in the model.
        pad_id: Token to pad with.
    """
    device = next(model.parameters()).device

    def loss(values: Gradients, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": ids.unsqueeze(0), "use_cache": False}
        logits = torch.func.functional_call(model, values, (), inputs).logits[0, -len(labels) :][:-1]
        targets = labels[1:]
        total = nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")

    def each(rows: Sequence[TokenisedExample]) -> Gradients:
        batch = collate(rows, pad_id=pad_id)
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        # The other kernels for attention have no rule for vmap, which would go through the examples one by one.
        with sdpa_kernel(SDPBackend.MATH), no_look_for_padding(model):
            found: Gradients = gradients(values, batch["input_ids"].to(device), batch["labels"].to(device))
        return found

    return each


def one_by_one(model: Any, parameters: _Parameters, *, pad_id: int) -> PerExample:
    """Return the way that asks nothing of the model: a forward and a backward pass for each example.

    Args:
        model: The model, for whatever task.
        parameters: What is trained.
        pad_id: Token to pad with.
    """
    names, values = list(parameters), list(parameters.values())

    def each(rows: Sequence[TokenisedExample]) -> Gradients:
        found = []
        for row in rows:
            losses, _ = target_losses(model, collate([row], pad_id=pad_id))
            found.append(torch.autograd.grad(losses.mean(), values, allow_unused=True))
        if missing := [name for name, parts in zip(names, zip(*found, strict=True), strict=True) if None in parts]:
            raise _unsure(model, f"{len(missing)} of {len(names)} tensors that are trained have no part in the loss")
        return {name: torch.stack(parts) for name, parts in zip(names, zip(*found, strict=True), strict=True)}

    return each


def checked(model: Any, parameters: _Parameters, *, pad_id: int, example: TokenisedExample) -> PerExample:
    """Return the quicker of the two ways that is right for this model, tried on two made-up texts.

    Every parameter must have a gradient for each example, the same one as by itself: a library that quietly leaves a
    parameter out, or takes another number for the batch, would train it without noise or without a bound. Nothing of
    the data is looked at, so that what is found out says nothing about them.

    Args:
        model: The model, in evaluation mode.
        parameters: What is trained.
        pad_id: Token to pad with.
        example: For the form of the task alone: whether it has a label, or an encoder's part.

    Raises:
        ModelError: `GRADIENT_UNSURE`.
    """
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise _unsure(model, "it normalises over a batch, where examples see one another (E07)")
    plain = one_by_one(model, parameters, pad_id=pad_id)
    if example.apart or example.label is not None:
        # The first texts of such a task would need a mask, which most models cannot take under vmap.
        plain(_made_up(model, example))
        return plain
    quick, rows = at_once(model, parameters, pad_id=pad_id), _made_up(model, example)
    with _moved(parameters):
        expected = plain(rows)
        try:
            # torch warns where it goes through the examples one by one after all.
            with PROCESS_STATE, warnings.catch_warnings(category=UserWarning, action="error"):
                found = quick(rows)
        except _MISFITS:
            return plain
    return quick if _equal(found, expected) else plain


def _made_up(model: Any, like: TokenisedExample) -> list[TokenisedExample]:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    rows = []
    for length in _LENGTHS:
        ids = tuple((1 + 5 * place + length) % vocabulary for place in range(length))
        mask = tuple(like.label is None and place >= length // 2 for place in range(length))
        rows.append(TokenisedExample(ids, mask, False, 0, like.apart, None if like.label is None else 0))
    return rows


class _moved:  # noqa: N801  (a context manager, as in contextlib)
    """Other values for a while: where a factor is zero, as LoRA's B at the start, gradients of others are too."""

    def __init__(self, parameters: _Parameters) -> None:
        self._parameters = parameters
        self._before = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def __enter__(self) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                draw = torch.randn(parameter.shape, generator=torch_generator(0, "per example", name))
                parameter.add_(draw.to(parameter) * 0.02)

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._before[name])


def _equal(found: Gradients, expected: Gradients) -> bool:
    total = float(torch.stack([part.norm() for part in expected.values()]).norm())
    return all(
        name in found
        and found[name].shape == part.shape
        and float((found[name] - part).norm()) <= _TOLERANCE * float(part.norm()) + _FLOOR * total
        for name, part in expected.items()
    )


def _unsure(model: Any, why: str) -> ModelError:
    return ModelError(
        "GRADIENT_UNSURE",
        f"the gradient of a single example is not sure for {type(model).__name__}: {why}",
        where="privacy.differential_privacy",
        fix="choose another tuning method or base model, or `unit: none`",
    )
