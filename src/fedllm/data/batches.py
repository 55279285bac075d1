"""Tokenised examples -> batches of tensors, and which examples stand in which batch.

Shapes: R rows, L tokens in the longest row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from fedllm.data.tokens import TokenisedExample
from fedllm.errors import ConfigError
from fedllm.seeds import stream

IGNORED = -100
_LEAK_ALLOWED = 0.1


@dataclass(frozen=True)
class BatchOrder:
    """Which examples stand in the batch of each step, as a function of the step alone.

    Epochs follow one another without end, each in an order of its own. The last batch of an epoch holds what is
    left, so it can be smaller; no batch holds an example twice.

    Args:
        num_examples: Examples of the party, at least 1.
        batch_size: Examples per batch; a larger one than the data set means the whole data set.
        seed: The job's seed.
        party: The party's name.
    """

    num_examples: int
    batch_size: int
    seed: int = field(kw_only=True)
    party: str = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.num_examples < 1 or self.batch_size < 1:
            raise ValueError("a batch needs at least one example")

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every example is seen once."""
        return math.ceil(self.num_examples / self.batch_size)

    def batch(self, step: int) -> list[int]:
        """Return the indices of the examples of a step.

        Args:
            step: Number of the step over the whole run, from 0.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.num_examples, self.seed, self.party, epoch)
        return [int(i) for i in order[place * self.batch_size : (place + 1) * self.batch_size]]


@lru_cache(maxsize=64)
def _epoch_order(num_examples: int, seed: int, party: str, epoch: int) -> np.ndarray:
    return stream(seed, "order", party, epoch).permutation(num_examples)


def collate(
    examples: Sequence[TokenisedExample], *, pad_id: int, packing: bool = False, max_length: int | None = None
) -> dict[str, torch.Tensor]:
    """Return a batch of int64 tensors, each of shape (R, L), padded on the right to the longest row.

    Without packing: `input_ids`, `attention_mask` (1 = token, 0 = padding), `labels` (-100 where not a target); row
    i is example i. Where the targets are apart, `input_ids` and `attention_mask` hold what the encoder reads, and
    `labels` what the decoder answers; a classifier's `labels` are the label numbers, shape (R,).

    With packing: `input_ids`, `labels`, `position_ids` and `example_ids`; no attention mask,
    because transformers keeps packed examples apart only where none is given and `use_cache=False`. Positions start
    again at 0 with each example and with the padding; `example_ids` (not for the model) is the index of the example
    that a token is of, -1 for padding.

    Args:
        examples: At least one.
        pad_id: Token to pad with.
        packing: Whether to put several examples into a row.
        max_length: Tokens in a packed row, at most; None: as many as the longest example has.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    if packing:
        return _packed(examples, pad_id, max_length)
    if examples[0].label is not None:
        numbers = torch.tensor([example.label for example in examples], dtype=torch.int64)
        return _inputs([list(example.input_ids) for example in examples], pad_id) | {"labels": numbers}
    if examples[0].apart:
        given, wanted = ([_side(example, side) for example in examples] for side in (False, True))
        return _inputs(given, pad_id) | {"labels": _padded(wanted, IGNORED)}
    return _inputs([list(example.input_ids) for example in examples], pad_id) | {
        "labels": _padded([_labels(example) for example in examples], IGNORED),
    }


def _inputs(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": _padded(rows, pad_id),
        "attention_mask": _padded([[1] * len(row) for row in rows], 0),
    }


def packing_leak(model: nn.Module, *, num_tokens: int = 8) -> float:
    """Return how much a packed example sees of the one before it: 0 = nothing, about 1 = as if they were one text.

    transformers isolates packed examples by their positions, but not in every family of models.

    Args:
        model: A causal language model with at least `2 * num_tokens` words and positions.
        num_tokens: Length of the two examples tried.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, 2 * num_tokens + 1, device=device).remainder(_vocabulary(model)).unsqueeze(0)
    apart = torch.arange(num_tokens, device=device).repeat(2).unsqueeze(0)
    together = torch.arange(2 * num_tokens, device=device).unsqueeze(0)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = model(input_ids=ids[:, num_tokens:]).logits[:, -num_tokens:]
            packed, joined = (
                model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, -num_tokens:]
                for positions in (apart, together)
            )
    finally:
        model.train(was_training)
    return float((packed - alone).norm() / (joined - alone).norm().clamp_min(1e-12))


def need_isolated_packing(model: nn.Module) -> None:
    """Refuse packing for a model in which packed examples see one another.

    Args:
        model: The base model, with or without an adapter.

    Raises:
        ConfigError: `BAD_COMBINATION`.
    """
    try:
        leak = packing_leak(model)
    except TypeError:  # the family takes no `position_ids`
        leak = 1.0
    if leak > _LEAK_ALLOWED:
        raise ConfigError(
            "BAD_COMBINATION",
            f"{type(model).__name__} does not keep packed examples apart",
            where="data.packing",
            fix="set `packing: false`",
        )


def _vocabulary(model: nn.Module) -> int:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])


def _labels(example: TokenisedExample) -> list[int]:
    wanted = [token if is_target else IGNORED for token, is_target in _pairs(example)]
    return [IGNORED, *wanted[1:]]


def _pairs(example: TokenisedExample) -> list[tuple[int, bool]]:
    return list(zip(example.input_ids, example.loss_mask, strict=True))


def _side(example: TokenisedExample, is_target: bool) -> list[int]:
    return [token for token, wanted in _pairs(example) if wanted is is_target]


def _packed(examples: Sequence[TokenisedExample], pad_id: int, max_length: int | None) -> dict[str, torch.Tensor]:
    lengths = [len(example.input_ids) for example in examples]
    rows = _rows(lengths, max_length or max(lengths))
    width = max(sum(lengths[i] for i in row) for row in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": [], "example_ids": []}
    for row in rows:
        left = range(width - sum(lengths[i] for i in row))
        batch["input_ids"].append([t for i in row for t in examples[i].input_ids] + [pad_id for _ in left])
        batch["labels"].append([t for i in row for t in _labels(examples[i])] + [IGNORED for _ in left])
        batch["position_ids"].append([p for i in row for p in range(lengths[i])] + list(left))
        batch["example_ids"].append([i for i in row for _ in range(lengths[i])] + [-1 for _ in left])
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in batch.items()}


def _rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return which examples share a row: the longest first, each into the first row with room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if place is None:
            rows.append([i])
            room.append(capacity - lengths[i])
        else:
            rows[place].append(i)
            room[place] -= lengths[i]
    return rows


def _padded(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], dtype=torch.int64)
