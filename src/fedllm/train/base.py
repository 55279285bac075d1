"""The seam of local training: what a trainer is given for one round, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedllm.data.batches import BatchOrder
from fedllm.data.settings import DataSettings
from fedllm.data.tokens import TokenisedExample
from fedllm.models.adapter import TunableModel
from fedllm.privacy.rounds import PrivateRound
from fedllm.train.corrections import Correction
from fedllm.train.settings import TrainSettings


@dataclass(frozen=True)
class TrainTask:
    """One round's work at one party.

    `first_step` and `num_steps` count optimiser steps of the whole run, so that the order of the data and the
    learning rate are functions of the round and not of what happened before it. `corrections` are called after
    clipping, right before each step of the optimiser. Where training is private, `private` has its terms.
    """

    party: str
    round: int
    seed: int
    model: TunableModel
    examples: Sequence[TokenisedExample]
    order: BatchOrder
    pad_id: int
    settings: TrainSettings
    data_settings: DataSettings
    first_step: int
    num_steps: int
    learning_rate: Callable[[int], float]
    deadline: float
    on_step: Callable[[int, int], None] = lambda step, num_steps: None
    corrections: Sequence[Correction] = ()
    private: PrivateRound | None = None


@dataclass(frozen=True)
class TrainSums:
    """What a round's training adds up to; `loss_nats` is a sum over `tokens`."""

    loss_nats: float
    tokens: int
    examples: int
    steps: int


class LocalTrainer(Protocol):
    """Runs `task.num_steps` optimiser steps on `task.model` in place.

    One that keeps to `task.private` says so by an attribute `is_private` that is true.
    """

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        """Return the sums of the round.

        Args:
            task: What to train on and how.
            optimizer: Over the trainable parameters; its state is the party's own.

        Raises:
            RunFailed: `NONFINITE` or `ROUND_TIMEOUT`.
        """
        ...
