"""How much noise a job means at each party, and the epsilon that follows, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.job.job import Job
from fedllm.privacy.accountant import accountant_name
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
    """

    party: str
    unit: str
    num_units: int
    sampling_rate: float
    noise_multiplier: float
    epsilon: float
    delta: float
    accountant: str

    @property
    def text(self) -> str:
        """The same as a sentence."""
        return (
            f"epsilon {self.epsilon:.2f} per {self.unit} at delta {self.delta:g} ({self.accountant}): noise "
            f"{self.noise_multiplier:.2f}, each of {self.num_units} drawn with chance {self.sampling_rate:.3g}"
        )


def noise_at(job: Job, party: str, *, examples: int, groups: int, steps: int) -> NoiseAt | None:
    """Return what a job means at a party; None where it hides nothing.

    Args:
        job: The job.
        party: The party.
        examples: Its training examples.
        groups: The persons they are of.
        steps: Optimiser steps of a round.

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
        steps=steps * job.federation.num_rounds,
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
