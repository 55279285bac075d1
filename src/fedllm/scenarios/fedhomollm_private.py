"""FedHomoLLM at a party whose training has noise: what a round is asked to be, and what is told of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from fedllm.data.tokens import TokenisedExample
from fedllm.privacy.budget import Budget
from fedllm.privacy.differential import DifferentialPrivacySettings
from fedllm.privacy.rounds import PrivateRound
from fedllm.privacy.terms import Terms, run_mechanism
from fedllm.scenarios.base import ClientContext

# A party's own, so that a sum over the parties holds each by itself.
SPENT = "epsilon_spent/"


class PrivateTraining:
    """The terms of a party's noise, the same in every round.

    Args:
        context: The party's.
        num_steps: Optimiser steps of a round.
    """

    def __init__(self, context: ClientContext, *, num_steps: int) -> None:
        self._c, self._num_steps = context, num_steps
        self._units = units_of(context.data.train, self._settings)

    @property
    def _settings(self) -> DifferentialPrivacySettings:
        return self._c.privacy.differential_privacy

    @property
    def _budget(self) -> Budget:
        if self._c.budget is None:
            raise RuntimeError("private training was asked for without a ledger")
        return self._c.budget

    @cached_property
    def terms(self) -> Terms:
        """What the job asks of this party's data, with the noise that keeps the whole run within its epsilon."""
        asked, train, data = self._settings, self._c.train_settings, self._c.data.digest
        run = run_mechanism(
            asked,
            num_units=len(self._units),
            expected_units=train.per_device_train_batch_size * train.gradient_accumulation_steps,
            steps=self._num_steps * self._c.settings.num_rounds,
            party=self._c.party,
        )
        _, delta, accountant = asked.limits
        in_round = replace(run, steps=self._num_steps)
        column = self._c.data_settings.group_by or ""
        return Terms(asked.unit, data, in_round, delta, accountant, asked.epsilon, column)

    def open(self, number: int, *inputs: Mapping[str, torch.Tensor]) -> PrivateRound:
        """Return the terms of a round's training, after it has been paid for.

        Args:
            number: The round.
            inputs: All tensors that the round starts from.

        Raises:
            BudgetExhausted: `BUDGET_EXHAUSTED` or `BUDGET_OTHER_UNIT`.
            StateLost: `LEDGER_BROKEN`.
        """
        mechanism, clip_norm = self.terms.round, self._settings.clip_norm
        assert clip_norm is not None  # noqa: S101
        noise = self._budget.open_round(number, inputs_digest(inputs), self.terms)
        return PrivateRound(self._units, mechanism.sampling_rate, mechanism.noise_multiplier, clip_norm, noise)

    def counts(self) -> dict[str, float]:
        """Return what is told of a round beside the update. Losses and tokens have had no noise, and stay unknown."""
        # A sum has the same counts from all: of the others' the party says nothing.
        others = dict.fromkeys((SPENT + party for party in self._c.parties), 0.0)
        return {"steps": float(self._num_steps), **others, SPENT + self._c.party: self._budget.spent(self.terms)}

    def own_values(self) -> dict[str, float]:
        """Return what the party notes for itself."""
        mechanism = self.terms.round
        return {
            "steps": float(self._num_steps),
            "sampling_rate": mechanism.sampling_rate,
            "noise_multiplier": mechanism.noise_multiplier,
            "epsilon_spent_by_all_runs": self._budget.spent_by_all(self.terms),
        }


def units_of(examples: Sequence[TokenisedExample], settings: DifferentialPrivacySettings) -> list[tuple[int, ...]]:
    """Return the indices of each unit's examples.

    Args:
        examples: A party's.
        settings: Of which the unit counts.
    """
    if settings.unit != "group":
        return [(index,) for index in range(len(examples))]
    groups: dict[str | None, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.group, []).append(index)
    return [tuple(members) for members in groups.values()]


def inputs_digest(inputs: Sequence[Mapping[str, torch.Tensor]]) -> str:
    """Return a SHA-256 of all that a round starts from.

    Args:
        inputs: Named tensors; their order counts.
    """
    digest = hashlib.sha256()
    for number, tensors in enumerate(inputs):
        for name in sorted(tensors):
            tensor = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            digest.update(f"{number}/{name}/{tensor.dtype}/{tensor.numel()}/".encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
