"""How much noise a job means at each party, and the epsilon that follows, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedllm.data.tokens import TokenisedExample
from fedllm.job.job import Job
from fedllm.privacy.accountant import Mechanism, accountant_name, epsilon_of
from fedllm.privacy.budget import Purse
from fedllm.privacy.ledger import data_digest, spent_on
from fedllm.privacy.terms import run_epsilon, run_mechanism


@dataclass(frozen=True)
class NoiseAt:
    """A party's share of a private run.

    Args:
        party: The party.
        unit: Whose traces are hidden.
        num_units: How many of them the party has.
        sampling_rate: Chance of each to be in a step.
        noise_multiplier: Standard deviation of the noise in clip norms.
        epsilon: Of the whole run.
        delta: Chance that it does not hold.
        accountant: Who added up.
        with_earlier: The epsilon of this run and all earlier ones on the same data; None where that is not known.
        max_epsilon: What the site allows for it.
    """

    party: str
    unit: str
    num_units: int
    sampling_rate: float
    noise_multiplier: float
    epsilon: float
    delta: float
    accountant: str
    with_earlier: float | None = None
    max_epsilon: float | None = None

    @property
    def text(self) -> str:
        """The same as a sentence."""
        text = (
            f"epsilon {self.epsilon:.2f} per {self.unit} at delta {self.delta:g} ({self.accountant}): noise "
            f"{self.noise_multiplier:.2f}, each of {self.num_units} drawn with chance {self.sampling_rate:.3g}"
        )
        if self.with_earlier is None or self.with_earlier <= self.epsilon:
            return text
        text += f"; with earlier runs on the same data epsilon {self.with_earlier:.2f}"
        if self.max_epsilon is None or self.with_earlier <= self.max_epsilon:
            return text
        return f"{text}, ABOVE the {self.max_epsilon:g} that the site allows: the run will stop before its end"


def with_earlier(found: NoiseAt, job: Job, purse: Purse, examples: Sequence[TokenisedExample]) -> NoiseAt:
    """Return the same with what earlier runs have spent on the same data.

    Args:
        found: From `noise_at`.
        job: The job.
        purse: The site's.
        examples: The party's training examples.

    Raises:
        StateLost: `LEDGER_BROKEN`.
    """
    _, delta, accountant = job.privacy.differential_privacy.limits
    steps = steps_per_round(job, len(examples)) * job.federation.num_rounds
    run = Mechanism(found.sampling_rate, found.noise_multiplier, steps)
    earlier = spent_on(purse.ledger(found.party).charges(), data_digest(examples))
    epsilon = epsilon_of([*earlier, run], delta=delta, accountant=accountant)
    return replace(found, with_earlier=epsilon, max_epsilon=purse.max_epsilon)


def steps_per_round(job: Job, num_examples: int) -> int:
    """Return the optimiser steps of a party in one round.

    Args:
        job: The job.
        num_examples: The party's training examples.
    """
    if job.train.local_steps:
        return job.train.local_steps
    batches = (job.train.local_epochs or 1) * -(-num_examples // job.train.per_device_train_batch_size)
    return -(-batches // job.train.gradient_accumulation_steps)


def noise_at(job: Job, party: str, *, examples: int, groups: int) -> NoiseAt | None:
    """Return what a job means at a party; None where it hides nothing.

    Args:
        job: The job.
        party: The party.
        examples: Its training examples.
        groups: The persons they are of.

    Raises:
        ConfigError: `BAD_VALUE`, no noise is enough.
    """
    asked = job.privacy.differential_privacy
    if not asked.is_local:
        return None
    num_units = groups if asked.unit == "group" else examples
    run = run_mechanism(
        asked,
        num_units=num_units,
        expected_units=job.train.per_device_train_batch_size * job.train.gradient_accumulation_steps,
        steps=steps_per_round(job, examples) * job.federation.num_rounds,
        party=party,
    )
    _, delta, accountant = asked.limits
    return NoiseAt(
        party=party,
        unit=asked.unit,
        num_units=num_units,
        sampling_rate=run.sampling_rate,
        noise_multiplier=run.noise_multiplier,
        epsilon=run_epsilon(asked, run),
        delta=delta,
        accountant=accountant_name(accountant),
    )
