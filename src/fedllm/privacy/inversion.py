"""Which tokens a party trained on, read from its update alone: the span test.

Shapes: V words of the vocabulary, D hidden size, R rows of a factor (its rank, or the width of a whole matrix).

A layer that computes y = W x changes, by one step of SGD, by -rate sum_t dL/dy_t x_t^T: every row of its update is a
combination of the inputs x_t. In the first block of a decoder without absolute positions x_t is the normalised
embedding of the token, so anyone who has the base model can try each word of the vocabulary. Source: Petrov et al.
2024, DAGER, arXiv:2405.15586, section 4.1. Differs: LoRA's factors are read too, several layers and rounds together;
and words are ranked, as noise and AdamW leave no exact span.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedllm.errors import ModelError
from fedllm.privacy.membership import Membership, membership

_READS = r"\.layers\.0\.self_attn\.(?:q|k|v|qkv)_proj\."
_WHOLE = re.compile(_READS + r"(?:lora_A\.default\.)?weight$")
_FACTOR_B = re.compile(r"(?P<head>.*" + _READS + r")lora_B\.default\.weight$")
# Under AdamW and noise, so many of the strongest directions say more than all of them.
_STRONGEST = 24


def first_inputs(model: nn.Module, only: Sequence[int] | None = None) -> torch.Tensor:
    """Return what the first block's attention reads for each word of the vocabulary, float64, shape (V, D).

    Args:
        model: A decoder of transformers, or one with an adapter on it.
        only: These words alone, in this order.

    Raises:
        ModelError: `PEFT_TARGET`, its first block reads more than the token: its place, or a prompt.
    """
    found: Any = dict(model.named_modules())
    norm = next((module for name, module in found.items() if name.endswith(".layers.0.input_layernorm")), None)
    words = next((module for name, module in found.items() if name.endswith(".embed_tokens")), None)
    if norm is None or words is None:
        raise ModelError(
            "PEFT_TARGET",
            "the span test needs a decoder whose first block reads the normalised embeddings, such as Llama or Qwen",
            fix="attack a model of such a family",
        )
    with torch.no_grad():
        rows = words.weight if only is None else words.weight[list(only)]
        inputs: torch.Tensor = norm(rows).double().cpu()
    return inputs


def token_distances(
    inputs: torch.Tensor, updates: Iterable[Mapping[str, torch.Tensor]], *, directions: int | None = None
) -> torch.Tensor:
    """Return how far each word of the vocabulary lies from the span of the updates' rows, shape (V,), in [0, 1].

    What is read are the changes of the first block's query, key and value matrices, or those of LoRA's factor A on
    them. A distance of 0 says that the word was there. It is exact where SGD ran and the distinct words are fewer than
    the rows. Where there is nothing to read, as of factor A while B is 0, every distance is 1.

    Args:
        inputs: From `first_inputs`, shape (V, D).
        updates: One or more updates of a party, or sums of several, by parameter name.
        directions: How many directions of the span to use, the strongest; by default all that are above rounding.
            Under AdamW or noise every direction is, and the strongest few say more.
    """
    read = [tensor for update in updates for name, tensor in sorted(update.items()) if _WHOLE.search(name)]
    return _distances(inputs, _basis(read, directions))


def token_distances_by_b(
    inputs: torch.Tensor,
    update: Mapping[str, torch.Tensor],
    sent: Mapping[str, torch.Tensor],
    *,
    directions: int | None = None,
) -> torch.Tensor:
    """Return how far each word, seen through factor A, lies from the span of the rows of B's change, shape (V,).

    B's gradient is sum_t dL/dy_t (A x_t)^T, which is not zero in the first round. It shows R numbers of each input, so
    the words must be fewer than the rank. The mean over the first block's query, key and value counts.

    Args:
        inputs: From `first_inputs`, shape (V, D).
        update: A party's update, by parameter name.
        sent: The adapter that it started from; the server has it.
        directions: As for `token_distances`.
    """
    found = []
    for name, change in sorted(update.items()):
        if match := _FACTOR_B.match(name):
            # A party of lower rank trains the first slots.
            factor_a = sent[match["head"] + "lora_A.default.weight"][: change.shape[1]]
            seen = inputs @ factor_a.double().T
            found.append(_distances(seen, _basis([change], directions)))
    return torch.stack(found).mean(dim=0) if found else torch.ones(len(inputs), dtype=torch.float64)


@dataclass(frozen=True)
class WordsTold:
    """How well the words that were read are told from others of a pool: `found` is `share_found`, by chance so many.

    `ranked` has the AUC: the chance that a word that was read lies nearer than another one.
    """

    found: float
    by_chance: float
    ranked: Membership


def is_read(update: Iterable[str]) -> bool:
    """Return whether an update of these names holds what the span test looks at.

    Args:
        update: Parameter names.
    """
    return any(_WHOLE.search(name) or _FACTOR_B.match(name) for name in update)


def span_test(
    inputs: torch.Tensor,
    update: Mapping[str, torch.Tensor],
    sent: Mapping[str, torch.Tensor],
    *,
    there: Sequence[bool],
) -> WordsTold | None:
    """Return how well an update tells the words that were read; None where no word or every one was.

    Whole matrices and factor A are tried, and factor B, each with all directions and with the strongest. The way with
    the largest AUC counts, as an attacker would know it from trials with texts of its own.

    Args:
        inputs: From `first_inputs`, of V words to tell apart, shape (V, D). Best all words that any party has: then it
            is of no help to know which are common.
        update: A party's update, or a sum of several.
        sent: What training started from.
        there: Whether each of the words was read.
    """
    if all(there) or not any(there):
        return None
    read = torch.tensor(there)
    told = []
    for directions in (None, _STRONGEST):
        for distances in (
            token_distances(inputs, [update], directions=directions),
            token_distances_by_b(inputs, update, sent, directions=directions),
        ):
            found = share_found(distances, read.nonzero()[:, 0].tolist())
            ranked = membership(-distances[read].numpy(), -distances[~read].numpy())
            told.append(WordsTold(found, float(read.double().mean()), ranked))
    return max(told, key=lambda each: each.ranked.auc)


def nearest_words(distances: torch.Tensor, number: int) -> set[int]:
    """Return the words of the smallest distances.

    Args:
        distances: Per word of the vocabulary, shape (V,).
        number: How many.
    """
    return set(distances.argsort(stable=True)[:number].tolist())


def share_found(distances: torch.Tensor, words: Iterable[int]) -> float:
    """Return the share of the words that are among as many nearest ones, in [0, 1].

    Args:
        distances: Per word of the vocabulary, shape (V,).
        words: What was trained on.
    """
    there = set(words)
    return len(there & nearest_words(distances, len(there))) / len(there)


def _basis(matrices: Sequence[torch.Tensor], directions: int | None) -> torch.Tensor | None:
    """Return an orthonormal basis of the span of all rows, shape (directions, D); None where all rows are zero."""
    changed = [matrix.double() for matrix in matrices if matrix.abs().sum() > 0]
    if not changed:
        return None
    # Rounds differ in size: what is small in a large one is still above rounding.
    rows = torch.cat([matrix / torch.linalg.matrix_norm(matrix) for matrix in changed])
    basis: torch.Tensor
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    # Parameters are float32, and an update is a difference of two: about four digits of it are left.
    above = int((values > 1e-4 * values[0]).sum())
    return basis[: min(above, directions or above)]


def _distances(inputs: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    if basis is None:
        return torch.ones(len(inputs), dtype=torch.float64)
    beside = inputs - inputs @ basis.T @ basis
    found: torch.Tensor = beside.norm(dim=1) / inputs.norm(dim=1)
    return found
