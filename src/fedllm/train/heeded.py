"""A trainer that is held to what the federation adds to each step: one that leaves it out is an error, not silence."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedllm.errors import ConfigError
from fedllm.train.base import LocalTrainer, TrainSums, TrainTask
from fedllm.train.corrections import Correction


class Heeded:
    """Trains by another trainer, and notices whether that has called the task's corrections.

    Args:
        trainer: The one that trains. One that makes no steps, for a rehearsal, says so by `makes_no_steps`.
    """

    def __init__(self, trainer: LocalTrainer) -> None:
        self._trainer = trainer
        self.is_private = bool(getattr(trainer, "is_private", False))

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        """Return the sums of the round; see `LocalTrainer`.

        Args:
            task: What to train on and how.
            optimizer: Over the trainable parameters.

        Raises:
            ConfigError: `BAD_COMBINATION`, there are corrections, and one was never called.
            RunFailed: As the trainer does.
        """
        called = [False] * len(task.corrections)

        def noted(number: int, correct: Correction) -> Correction:
            def call(rate: float) -> None:
                called[number] = True
                correct(rate)

            return call

        corrections = [noted(number, correct) for number, correct in enumerate(task.corrections)]
        sums = self._trainer.train(replace(task, corrections=corrections), optimizer)
        if not all(called) and not getattr(self._trainer, "makes_no_steps", False):
            raise ConfigError(
                "BAD_COMBINATION",
                f"{type(self._trainer).__name__} never called `task.corrections`, so what the job adds to each step"
                " (FedProx, SCAFFOLD, a claimant's mark) had no effect",
                where=f"trainer, party {task.party}, round {task.round}",
                fix="call each with the learning rate right before each step of the optimiser, as"
                " docs/how-to/own-trainer.md shows",
            )
        return sums
