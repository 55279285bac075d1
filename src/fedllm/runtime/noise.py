"""How much noise a job means at each party, and the epsilon that follows, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedllm.job.job import Job
from fedllm.privacy.accountant import Mechanism, accountant_name, epsilon_of
from fedllm.privacy.budget import PURSE_FOLDER, Budget, Purse
from fedllm.privacy.ledger import spent_on
from fedllm.privacy.party_level import noise_to_signal
from fedllm.privacy.terms import run_epsilon, run_mechanism
from fedllm.runs.folder import RunFolder
from fedllm.scenarios.base import TokenData

# Noise so many times as long as what is learned from leaves nothing of it.
_DROWNED = 10.0


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
        drowns: Where whole parties are hidden: norm of the noise on the mean, over the largest norm of the mean.
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
    drowns: float | None = None

    @property
    def text(self) -> str:
        """The same as a sentence."""
        if self.drowns is not None:
            return (
                f"epsilon {self.epsilon:.2f} per {self.unit} at delta {self.delta:g} ({self.accountant}): noise "
                f"{self.noise_multiplier:.2f} on the sum of clipped updates. The noise on their mean is "
                f"{self.drowns:.0f} times as long as the mean can be"
                + ("; nothing will be learned: hide examples instead (W10)" if self.drowns > _DROWNED else "")
            )
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


def with_earlier(found: NoiseAt, job: Job, purse: Purse, data: TokenData) -> NoiseAt:
    """Return the same with what earlier runs have spent on the same data, where the party spends it.

    Args:
        found: From `noise_at`.
        job: The job.
        purse: The site's.
        data: The party's.

    Raises:
        BudgetExhausted: `BUDGET_OTHER_UNIT`.
        StateLost: `LEDGER_BROKEN`.
    """
    asked = job.privacy.differential_privacy
    if not asked.is_local:
        return found
    _, delta, accountant = asked.limits
    steps = steps_per_round(job, len(data.train)) * job.federation.num_rounds
    run = Mechanism(found.sampling_rate, found.noise_multiplier, steps)
    charges = purse.ledger(found.party).charges()
    earlier = spent_on(charges, data.digest, unit=asked.unit, group_by=job.data.group_by or "")
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


def noise_at(job: Job, party: str, *, examples: int, groups: int, size: int) -> NoiseAt | None:
    """Return what a job means at a party; None where it hides nothing.

    Args:
        job: The job.
        party: The party.
        examples: Its training examples.
        groups: The persons they are of.
        size: Values in an update.

    Raises:
        ConfigError: `BAD_VALUE`, no noise is enough.
    """
    asked = job.privacy.differential_privacy
    if asked.unit == "party":
        return _on_sums(job, party, size)
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


def _on_sums(job: Job, party: str, size: int) -> NoiseAt:
    asked, cohort = job.privacy.differential_privacy, job.federation.cohort_size(len(job.trainers))
    run = run_mechanism(asked, num_units=1, expected_units=1, steps=job.federation.num_rounds, party=party)
    _, delta, accountant = asked.limits
    return NoiseAt(
        party=party,
        unit=asked.unit,
        num_units=1,
        sampling_rate=1.0,
        noise_multiplier=run.noise_multiplier,
        epsilon=run_epsilon(asked, run),
        delta=delta,
        accountant=accountant_name(accountant),
        drowns=noise_to_signal(run.noise_multiplier, parties=cohort, size=size),
    )


def server_budget(job: Job, run: RunFolder) -> Budget | None:
    """Return what pays for the noise that the server adds, with the key of that noise; None where it adds none.

    Args:
        job: The job.
        run: The run folder.

    Raises:
        StateLost: `LEDGER_BROKEN`.
    """
    asked = job.privacy.differential_privacy
    if asked.unit != "party" or asked.placement != "central":
        return None
    trained = [number for number in run.checkpoints().present() if number]
    return Budget(
        Purse(run.path.parent / PURSE_FOLDER), party="server", run_id=run.run_id, folder=run.path, trained=trained
    )
