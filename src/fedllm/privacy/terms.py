"""What a job asks of one party's data: how often who is drawn, and how much noise hides it."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.errors import ConfigError
from fedllm.privacy.accountant import AccountantName, Mechanism, epsilon_of, noise_for
from fedllm.privacy.differential import DifferentialPrivacySettings


@dataclass(frozen=True)
class Terms:
    """The terms of a party's rounds, the same in each.

    Args:
        unit: Whose traces are hidden.
        data: Digest of the raw rows of the party's data.
        round: The noisy sums of one round.
        delta: Chance that epsilon does not hold.
        accountant: Who adds up.
        epsilon: The most that this run may spend; None is no limit.
        group_by: Column that names the person, where the unit is `group`; else empty.
    """

    unit: str
    data: str
    round: Mechanism
    delta: float
    accountant: AccountantName
    epsilon: float | None
    group_by: str = ""


def run_mechanism(
    asked: DifferentialPrivacySettings, *, num_units: int, expected_units: int, steps: int, party: str
) -> Mechanism:
    """Return the noisy sums of a whole run at one party; its noise is the least that keeps within the job's epsilon.

    Args:
        asked: The job's settings, of a unit that parties hide themselves.
        num_units: Examples or persons of the party.
        expected_units: How many of them a step is to draw on average.
        steps: Steps of the run.
        party: The party.

    Raises:
        ConfigError: `BAD_VALUE`, no noise is enough.
    """
    rate, noise = min(1.0, expected_units / num_units), asked.noise_multiplier
    if noise is None:
        epsilon, delta, accountant = asked.limits
        try:
            noise = noise_for(epsilon, delta=delta, sampling_rate=rate, steps=steps, accountant=accountant)
        except ValueError as error:
            where, fix = f"party {party}, privacy.differential_privacy.epsilon", "raise epsilon, or train fewer steps"
            raise ConfigError("BAD_VALUE", str(error), where=where, fix=fix) from None
    return Mechanism(rate, noise, steps)


def run_epsilon(asked: DifferentialPrivacySettings, mechanism: Mechanism) -> float:
    """Return the epsilon of a party's whole run.

    Args:
        asked: The job's settings.
        mechanism: From `run_mechanism`.
    """
    _, delta, accountant = asked.limits
    return epsilon_of([mechanism], delta=delta, accountant=accountant)
