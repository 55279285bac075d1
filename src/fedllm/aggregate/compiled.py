"""The inner loops of the exact sum as machine code, where numba (an extra) is installed; the bits are the same.

What NumPy does in several passes over a piece is one here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Loops(NamedTuple):
    """What is compiled, on a first call with values of a type: that takes about a second."""

    add: Callable[[np.ndarray, np.ndarray, int, float], None]
    """Add `weight` times the rounded `scale * values` to 64-bit integers: totals, values, weight, scale."""
    mean: Callable[[np.ndarray, np.ndarray, float], None]
    """Write 64-bit integers, divided by a scale, as float32: means, totals, scale."""


@lru_cache(maxsize=1)
def compiled_loops() -> Loops | None:
    """Return the loops; None without numba."""
    try:
        import numba
    except ImportError:
        return None

    def add(totals: np.ndarray, values: np.ndarray, weight: int, scale: float) -> None:
        for index in range(len(values)):
            totals[index] += weight * np.int64(np.rint(np.float64(values[index]) * scale))

    def mean(means: np.ndarray, totals: np.ndarray, scale: float) -> None:
        for index in range(len(totals)):
            means[index] = np.float64(totals[index]) / scale

    compiled = numba.njit(nogil=True)
    return Loops(compiled(add), compiled(mean))
