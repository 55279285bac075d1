"""What noise costs and buys: epsilon of Gaussian noise on Poisson samples, and the noise for an epsilon.

The mathematics is Google's dp-accounting, but for `fedllm.privacy.renyi`. Here are only the questions that a federation
asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Literal

from fedllm.privacy.renyi import divergences

AccountantName = Literal["PLD", "RDP"]

# A noise multiplier is found to this share of itself, from above.
_TOLERANCE = 1e-3
_LARGEST_NOISE = 1e6
_MOST_TRIES = 30
# Orders of RDP, the same as dp-accounting's.
_WHOLE_ORDERS = (*range(2, 64), 128, 256, 512, 1024)
_ORDERS_BETWEEN = tuple(tenths / 10 for tenths in range(11, 109) if tenths % 10)


@dataclass(frozen=True, order=True)
class Mechanism:
    """The same noisy sum, taken a number of times.

    Args:
        sampling_rate: Chance of each unit to be in a sum, in (0, 1]; 1 means that all are in every one.
        noise_multiplier: Standard deviation of the noise in clip norms, > 0.
        steps: How many sums.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int


def epsilon_of(mechanisms: Iterable[Mechanism], *, delta: float, accountant: AccountantName) -> float:
    """Return the epsilon of all sums together, for neighbours that differ by one unit more or less; infinite at most.

    Source: Koskela et al. 2020, arXiv:1906.03049, and Doroshenko et al. 2022, arXiv:2207.04380 (PLD, rounded up);
    Mironov et al. 2019, arXiv:1908.10530 (RDP). As in dp-accounting. Differs: RDP at orders between whole numbers is
    exact, where dp-accounting has a bound; see `fedllm.privacy.renyi`.

    Args:
        mechanisms: What was done, or will be, to the same data; their order has no influence.
        delta: Chance that epsilon does not hold, in (0, 1).
        accountant: PLD is tight; RDP is quicker, and some 10 to 20 % above it.
    """
    return _epsilon(_merged(mechanisms), delta, accountant)


def noise_for(epsilon: float, *, delta: float, sampling_rate: float, steps: int, accountant: AccountantName) -> float:
    """Return the least noise multiplier, to a thousandth, with which so many sums stay within epsilon.

    Args:
        epsilon: What may be spent, > 0.
        delta: Chance that epsilon does not hold, in (0, 1).
        sampling_rate: Chance of each unit to be in a sum, in (0, 1].
        steps: How many sums.
        accountant: As for `epsilon_of`.

    Raises:
        ValueError: No noise of a sensible size is enough.
    """
    return _noise(epsilon, delta, sampling_rate, steps, accountant)


def accountant_name(accountant: AccountantName) -> str:
    """Return the accountant with the library and the version that computes it.

    Args:
        accountant: Which one.
    """
    return f"{accountant}, dp-accounting {version('dp-accounting')}"


def _merged(mechanisms: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    steps: dict[tuple[float, float], int] = {}
    for found in mechanisms:
        key = (found.sampling_rate, found.noise_multiplier)
        steps[key] = steps.get(key, 0) + found.steps
    return tuple(sorted(Mechanism(*key, count) for key, count in steps.items() if count))


@lru_cache(maxsize=4096)
def _epsilon(mechanisms: tuple[Mechanism, ...], delta: float, accountant: AccountantName) -> float:
    if not mechanisms:
        return 0.0
    # Imported here: it brings scipy, which most commands do without.
    from dp_accounting import pld, rdp

    found = pld.PLDAccountant() if accountant == "PLD" else rdp.RdpAccountant(_WHOLE_ORDERS)
    for mechanism in mechanisms:
        found.compose(_event(mechanism.sampling_rate, mechanism.noise_multiplier), mechanism.steps)
    if accountant == "PLD":
        return float(found.get_epsilon(delta))
    spent = [*found.rdp.tolist(), *_between(mechanisms)]
    return float(rdp.compute_epsilon([*_WHOLE_ORDERS, *_ORDERS_BETWEEN], spent, delta)[0])


def _between(mechanisms: Iterable[Mechanism]) -> list[float]:
    """Return the Rényi divergences of all sums together at the orders between whole numbers."""
    each = [
        [found.steps * one for one in divergences(found.sampling_rate, found.noise_multiplier, _ORDERS_BETWEEN)]
        for found in mechanisms
    ]
    return [sum(column) for column in zip(*each, strict=True)]


@lru_cache(maxsize=256)
def _noise(epsilon: float, delta: float, sampling_rate: float, steps: int, accountant: AccountantName) -> float:
    def spent(noise: float, by: AccountantName = accountant) -> float:
        return _epsilon((Mechanism(sampling_rate, noise, steps),), delta, by)

    # RDP costs next to nothing, and its answer is close.
    noise = _by_halving(lambda noise: spent(noise, "RDP") <= epsilon)
    if accountant == "RDP":
        return noise
    slope = math.log(spent(noise, "RDP") / spent(1.1 * noise, "RDP")) / math.log(1.1)
    for _ in range(_MOST_TRIES):
        found = spent(noise)
        better = noise * (found / epsilon) ** (1 / slope)
        if found <= epsilon and better >= noise * (1 - _TOLERANCE):
            return noise
        # A little above what the slope says, so that the next try is enough.
        noise = better * (1 + _TOLERANCE / 2)
    raise ValueError(f"no noise was found for epsilon {epsilon:g} and delta {delta:g}")


def _by_halving(is_enough: Callable[[float], bool]) -> float:
    low, high = 0.25, 0.5
    while not is_enough(high):
        low, high = high, 2 * high
        if high > _LARGEST_NOISE:
            raise ValueError("no noise of a sensible size is enough for this epsilon and delta")
    while is_enough(low):
        low, high = low / 2, low
    while high > low * (1 + _TOLERANCE):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _event(sampling_rate: float, noise_multiplier: float) -> Any:
    import dp_accounting

    noisy = dp_accounting.GaussianDpEvent(noise_multiplier)
    return noisy if sampling_rate >= 1 else dp_accounting.PoissonSampledDpEvent(sampling_rate, noisy)
