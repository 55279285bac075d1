"""Rényi divergence of Gaussian noise on a Poisson sample at orders between whole numbers.

dp-accounting 0.6.0 bounds these from above, or leaves them out; whole orders it has exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Standard deviations on either side, behind which less than 1e-40 of the integral lies.
_TAIL = 15
# Steps in the smaller of the two lengths in which the integrand changes; the error falls exponentially with them.
_STEPS = 16
# Noise of so few clip norms has an epsilon in the hundreds. Steps would become too many, and no order is worth them.
_LEAST_NOISE = 0.05


def divergences(sampling_rate: float, noise_multiplier: float, orders: Sequence[float]) -> list[float]:
    """Return the Rényi divergence of one noisy sum at each order, in nats; infinite where the noise is below 0.05.

    Source: Mironov et al. 2019, arXiv:1908.10530, section 3.1: with z of N(0, s²), the logarithm of the mean of
    (1 - q + q e^((2z - 1) / 2s²)) to the power of the order, divided by the order less 1. Differs: it is integrated by
    the trapezoidal rule, to some ten digits, where section 3.3 has a series.

    Args:
        sampling_rate: q, chance of each unit to be in the sum, in (0, 1].
        noise_multiplier: s, standard deviation of the noise in clip norms, > 0.
        orders: Each above 1.
    """
    q, s = sampling_rate, noise_multiplier
    if s < _LEAST_NOISE:
        return [math.inf] * len(orders)
    alphas = np.array(orders)[:, None]
    step = min(s, s * s) / _STEPS
    z = np.arange(-_TAIL * s, max(orders) + _TAIL * s, step)
    left_out = math.log1p(-q) if q < 1 else -math.inf
    ratio = np.logaddexp(left_out, math.log(q) + (2 * z - 1) / (2 * s * s))
    density = -(z * z) / (2 * s * s) - math.log(s * math.sqrt(2 * math.pi))
    logs = alphas * ratio + density
    largest = logs.max(axis=1, keepdims=True)
    integrals = largest[:, 0] + np.log(np.exp(logs - largest).sum(axis=1) * step)
    found: list[float] = (integrals / (alphas[:, 0] - 1)).tolist()
    return found
