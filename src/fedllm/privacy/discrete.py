"""Noise in whole numbers, which parties add before a secure sum: nobody has to be trusted with the sum without it.

Source: Kairouz, Liu, Steinke 2021, "The Distributed Discrete Gaussian Mechanism", arXiv:2102.06387; the discrete
Gaussian is that of Canonne, Kamath, Steinke 2020, arXiv:2004.00010. Differs: no rotation, and values are rounded at
random without a condition on the norm; the norm that rounding may add is counted instead (`sensitivity`).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

# In steps of the grid. Above it the sum of discrete Gaussians is one, for all that matters (`excess`).
LEAST_DEVIATION = 4.0
# Beyond so many standard deviations are fewer than 2**-64 of all numbers.
TAIL = 9.2
_PIECE = 2**18


@lru_cache(maxsize=4)
def _thresholds(deviation: float) -> np.ndarray:
    most = math.ceil(TAIL * deviation)
    places = np.arange(-most, most + 1, dtype=np.float64)
    mass = np.exp(-(places**2) / (2 * deviation**2))
    # From the lower tail up to the middle, where small numbers are added to small ones; the rest mirrors it.
    below = np.cumsum(mass)[:most] / math.fsum(mass)
    lower = (below * 2.0**64).astype(np.uint64)
    upper = np.uint64(2**64 - 1) - lower[::-1]
    return np.concatenate([lower, upper])


def discrete_gaussian(draws: np.ndarray, deviation: float) -> np.ndarray:
    """Return numbers with the discrete Gaussian distribution, whose mass at k is as exp(-k^2 / (2 deviation^2)).

    Args:
        draws: Uniformly random 64-bit integers, uint64, shape (n,); one is used for each number.
        deviation: Its parameter, in steps; very nearly the standard deviation.

    Returns:
        int64, shape (n,). Probabilities are right to about 2**-50.
    """
    thresholds = _thresholds(deviation)
    found = np.empty(len(draws), np.int64)
    for start in range(0, len(draws), _PIECE):
        found[start : start + _PIECE] = np.searchsorted(thresholds, draws[start : start + _PIECE], side="right")
    return found - len(thresholds) // 2


def sensitivity(clip_norm: float, *, step: float, size: int) -> float:
    """Return the most by which one party's rounded update can move the sum, in L2.

    Rounding moves each of the values by less than a step.

    Args:
        clip_norm: Norm of an update before it is rounded, at most.
        step: Of the grid.
        size: How many values an update has.
    """
    return clip_norm + step * math.sqrt(size)


def excess(deviation: float, *, parties: int, size: int) -> float:
    """Return what the sum of discrete Gaussians, which is none itself, adds to 1 / noise multiplier, at most.

    Source: Kairouz et al., theorem 1: concentrated differential privacy of 1/2 e^2 with e = sensitivity / deviation of
    the sum + tau sqrt(size), tau = 10 sum over k from 1 to parties - 1 of exp(-2 pi^2 deviation^2 k / (k + 1)).

    Args:
        deviation: Of one party's noise, in steps.
        parties: How many add noise.
        size: How many values an update has.
    """
    tau = 10 * sum(math.exp(-2 * math.pi**2 * deviation**2 * k / (k + 1)) for k in range(1, parties))
    return tau * math.sqrt(size)
