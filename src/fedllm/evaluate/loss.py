"""Summed loss of a model over batches. Sums add over batches and parties; means do not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fedllm.data.batches import collate
from fedllm.data.tokens import TokenisedExample
from fedllm.errors import RunFailed
from fedllm.models.loss import target_logits, target_losses


@dataclass(frozen=True)
class LossSums:
    """Negative log-likelihood of targets, and over how much it was summed.

    `LossSums()` is the zero; two are added with `+`. `tokens` counts a classifier's labels too; of `choices` labels
    that were chosen, `correct` were right.
    """

    nll_nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    examples: int = 0
    choices: int = 0
    correct: int = 0

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(
            self.nll_nats + other.nll_nats,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.examples + other.examples,
            self.choices + other.choices,
            self.correct + other.correct,
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

    @property
    def accuracy(self) -> float:
        """Share of the labels chosen that are right, 0 to 100; NaN without one."""
        return 100 * self.correct / self.choices if self.choices else math.nan

    def values(self) -> dict[str, float]:
        """Return the metrics by name: loss, examples, and both perplexities, or the accuracy of labels."""
        if self.choices:
            return {"loss_nats": self.loss_nats, "accuracy": self.accuracy, "examples": self.examples}
        names = ("loss_nats", "perplexity_per_token", "perplexity_per_byte", "examples")
        return {name: getattr(self, name) for name in names}


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
        model: A model of transformers whose output has `logits`.
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


def evaluate_examples(
    model: nn.Module, examples: Sequence[TokenisedExample], *, pad_id: int, batch_size: int, where: str = ""
) -> LossSums:
    """Return the summed loss of a model on tokenised examples.

    Args:
        model: A model of transformers.
        examples: The examples.
        pad_id: The padding token.
        batch_size: Examples per forward pass.
        where: What is evaluated, for the error.
    """
    slices = (examples[start : start + batch_size] for start in range(0, len(examples), batch_size))
    batches = (
        collate(rows, pad_id=pad_id) | {"target_bytes": [example.target_bytes for example in rows]} for rows in slices
    )
    return summed_loss(model, batches, where=where)


def example_losses(
    model: nn.Module, examples: Sequence[TokenisedExample], *, pad_id: int, batch_size: int
) -> np.ndarray:
    """Return the mean loss of each example's target tokens in nats, float64, shape (examples,).

    Args:
        model: A model of transformers.
        examples: Each with a target.
        pad_id: The padding token.
        batch_size: Examples per forward pass.
    """
    found: list[float] = []
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            rows = examples[start : start + batch_size]
            nll, row = target_losses(model, collate(rows, pad_id=pad_id))
            sums = torch.zeros(len(rows), dtype=torch.float64).index_add(0, row.cpu(), nll.double().cpu())
            found += (sums / torch.bincount(row.cpu(), minlength=len(rows))).tolist()
    return np.array(found)


def _batch_loss(model: nn.Module, batch: Mapping[str, Any]) -> LossSums:
    logits, targets, _ = target_logits(model, batch)
    nll = nn.functional.cross_entropy(logits, targets, reduction="none")
    target_bytes = _byte_counts(batch)
    sums = LossSums(nll.double().sum().item(), len(nll), sum(target_bytes), len(target_bytes))
    if batch["labels"].dim() > 1:
        return sums
    return replace(sums, choices=len(targets), correct=int((logits.argmax(dim=-1) == targets).sum()))


def _byte_counts(batch: Mapping[str, Any]) -> Sequence[int]:
    counts = batch.get("target_bytes")
    return [0] * len(batch["labels"]) if counts is None else [int(count) for count in counts]


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
