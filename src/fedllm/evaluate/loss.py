"""Summed loss of a causal language model over batches. Sums add over batches and parties; means do not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedllm.errors import RunFailed

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
_NOT_A_TARGET = -100


@dataclass(frozen=True)
class LossSums:
    """Negative log-likelihood of target tokens, and over how much it was summed.

    `LossSums()` is the zero; two are added with `+`.
    """

    nll_nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    examples: int = 0

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(
            self.nll_nats + other.nll_nats,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.examples + other.examples,
        )

    @property
    def loss_nats(self) -> float:
        """Mean loss of a target token in nats; NaN without a token."""
        return self.nll_nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity_per_token(self) -> float:
        """exp(loss_nats). Two models may be compared by it only if they share a tokenizer."""
        return _exp(self.loss_nats)

    @property
    def perplexity_per_byte(self) -> float:
        """exp(nll / UTF-8 bytes of the targets), comparable between tokenizers; NaN without a byte count."""
        return _exp(self.nll_nats / self.bytes) if self.bytes else math.nan


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold the model in evaluation mode without gradients, then give each module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: tensors that a model caches under it could not be used in training after.
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def summed_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, where: str = "") -> LossSums:
    """Return the summed loss of the batches' target tokens, in float32 per token and float64 over them.

    The value does not depend on how the examples are batched or padded, beyond rounding. No more than
    one batch of logits is held; no global generator is drawn from.

    Args:
        model: A causal language model whose output has `logits`.
        batches: Each with `input_ids`, `attention_mask`, `labels` (-100 = not a target), of shape
            (rows, length), and perhaps `position_ids`, and `target_bytes`: for each example the UTF-8
            bytes of its targets. Without `target_bytes` a row counts as an example of 0 bytes.
        where: What is evaluated, for the error: party and split.

    Raises:
        RunFailed: `NONFINITE`, a batch's loss is NaN or infinite.
    """
    total = LossSums()
    with evaluating(model):
        for number, batch in enumerate(batches):
            sums = _batch_loss(model, batch)
            if not math.isfinite(sums.nll_nats):
                raise RunFailed(
                    "NONFINITE",
                    f"the evaluation loss of batch {number} is {sums.nll_nats}",
                    where=where,
                    fix="lower `learning_rate`, or check that the base model is whole",
                )
            total += sums
    return total


def _batch_loss(model: nn.Module, batch: Mapping[str, Any]) -> LossSums:
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in _MODEL_INPUTS if batch.get(name) is not None}
    targets = batch["labels"][:, 1:].to(device)
    wanted = targets != _NOT_A_TARGET
    logits = model(**inputs, use_cache=False).logits[:, :-1][wanted].float()
    nll = nn.functional.cross_entropy(logits, targets[wanted], reduction="none")
    target_bytes = _byte_counts(batch)
    return LossSums(nll.double().sum().item(), int(wanted.sum()), sum(target_bytes), len(target_bytes))


def _byte_counts(batch: Mapping[str, Any]) -> Sequence[int]:
    counts = batch.get("target_bytes")
    return [0] * len(batch["labels"]) if counts is None else [int(count) for count in counts]


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
