"""Distillation of an emulator's middle from the owner's model, on public text.

Source: Xiao et al. 2023, arXiv:2302.04870, section 3.3: a loss on the hidden states after the middle. Differs: hidden
states are divided by their root mean square, and the logits' Kullback-Leibler divergence stands in the place of the
loss on the text itself.

Shapes: R rows, L places, D hidden size, T targets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedllm.data.batches import BatchOrder, collate
from fedllm.data.tokens import TokenisedExample
from fedllm.errors import RunFailed
from fedllm.models.blocks import Cut, stacks
from fedllm.models.emulator import MEASURED_WAYS, Slots, choose, profile
from fedllm.models.emulator_settings import EmulatorSettings
from fedllm.models.loss import IGNORED, target_logits, target_losses

_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Distillation:
    """How to distil.

    Args:
        steps: Optimiser steps.
        learning_rate: Of AdamW, at its peak; cosine to 0.
        batch_size: Examples per step.
        hidden_weight: Of the loss on hidden states; 0: the teacher is asked for its logits only, as a service is.
        logit_weight: Of the loss on logits.
        cut: Bottom and top of both models.
        seed: Of the order of the examples.
        label: Names that order.
        deadline: `time.monotonic()` at which to give up.
    """

    steps: int
    learning_rate: float
    batch_size: int
    hidden_weight: float
    logit_weight: float
    cut: Cut
    seed: int
    label: str = "distillation"
    deadline: float = math.inf


def distil(
    student: nn.Module,
    teacher: nn.Module | None,
    examples: Sequence[TokenisedExample],
    *,
    how: Distillation,
    tuned: Sequence[nn.Parameter],
    pad_id: int,
) -> float:
    """Train some parameters of the student in place to do as the teacher does, and return the last step's loss.

    Where the student does so to the bit, no step is made: Adam would make whole steps of a gradient that is rounding.

    Args:
        student: The emulator.
        teacher: The owner's model; None: nobody can be asked, and the text itself is what is learnt.
        examples: Public text.
        how: How.
        tuned: Which parameters of the student.
        pad_id: The padding token.

    Raises:
        RunFailed: `ROUND_TIMEOUT`.
    """
    order = BatchOrder(len(examples), how.batch_size, seed=how.seed, party=how.label)
    # A parameter that two blocks share is trained once.
    parameters = list(dict.fromkeys(tuned))
    optimizer = torch.optim.AdamW(parameters, lr=how.learning_rate, weight_decay=0.0)
    for parameter in parameters:
        parameter.requires_grad_(True)
    loss = torch.zeros(())
    for step in range(how.steps):
        _check_time(how)
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * how.learning_rate * (1 + math.cos(math.pi * step / how.steps))
        batch = collate([examples[index] for index in order.batch(step)], pad_id=pad_id)
        loss = _loss(student, teacher, batch, how)
        if not loss:
            continue
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, _GRAD_NORM)
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return float(loss.detach())


def _check_time(how: Distillation) -> None:
    if time.monotonic() > how.deadline:
        what = "distillation did not finish within federation.round_timeout"
        raise RunFailed("ROUND_TIMEOUT", what, fix="raise `round_timeout`, or do fewer steps")


@torch.no_grad()
def distance(student: nn.Module, teacher: nn.Module, batch: Mapping[str, Any], *, how: Distillation) -> float:
    """Return the loss of distillation on a batch.

    Args:
        student: The emulator.
        teacher: The owner's model.
        batch: From `public_batches`.
        how: How.
    """
    return float(_loss(student, teacher, batch, how))


def _loss(student: nn.Module, teacher: nn.Module | None, batch: Mapping[str, Any], how: Distillation) -> torch.Tensor:
    if teacher is None:
        return target_losses(student, batch)[0].mean()
    with torch.no_grad():
        theirs, logits = _seen(teacher, batch, how.cut)
    ours, own_logits = _seen(student, batch, how.cut)
    divergence = nn.functional.kl_div(
        own_logits.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    total = how.logit_weight * divergence
    for path, hidden in theirs.items() if how.hidden_weight else ():
        wanted = _real(batch, hidden)
        scale = hidden.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
        distance = ((hidden - ours[path]) / scale).square().mean(-1)
        total = total + how.hidden_weight * distance[wanted].mean()
    return total


def _seen(model: nn.Module, batch: Mapping[str, Any], cut: Cut) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what comes out of the last block of each middle, (R, L, D), and the targets' logits."""
    found: dict[str, torch.Tensor] = {}

    def noted(path: str) -> Callable[..., None]:
        def note(_: nn.Module, inputs: Any, output: Any) -> None:
            found[path] = (output[0] if isinstance(output, tuple) else output).float()

        return note

    hooks = [
        blocks[len(blocks) - cut.top - 1].register_forward_hook(noted(path)) for path, blocks in stacks(model).items()
    ]
    try:
        logits, _, _ = target_logits(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found, logits


def _real(batch: Mapping[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    """Return which places hold text: of the input, or of a decoder's answer."""
    mask, labels = batch["attention_mask"].to(hidden.device), batch["labels"].to(hidden.device)
    if mask.dim() == 2 and mask.shape[1] == hidden.shape[1]:
        places: torch.Tensor = mask.bool()
        return places
    # Of a decoder, whose input is the answer.
    found: torch.Tensor = labels != IGNORED
    return found


def public_batches(examples: Sequence[TokenisedExample], *, pad_id: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield batches of examples in their order.

    Args:
        examples: Public text.
        pad_id: The padding token.
        batch_size: Examples each.
    """
    for start in range(0, len(examples), batch_size):
        yield collate(examples[start : start + batch_size], pad_id=pad_id)


def chosen(
    model: nn.Module, cut: Cut, settings: EmulatorSettings, public: Sequence[TokenisedExample], *, pad_id: int
) -> Slots:
    """Return which blocks of the owner's model stand in its emulator, as its settings choose them.

    Args:
        model: The owner's, untuned.
        cut: Bottom and top.
        settings: The owner's `emulator` section.
        public: Its public text, for the ways that measure blocks.
        pad_id: The padding token.
    """
    profiles = None
    if settings.way in MEASURED_WAYS:
        profiles = profile(model, public_batches(public, pad_id=pad_id, batch_size=settings.distil_batch_size))
    return choose(model, cut, way=settings.way, keep=settings.middle, profiles=profiles)
