"""Discrete Gaussian noise: its distribution, its sums, and what they are worth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedllm.privacy.discrete import LEAST_DEVIATION, discrete_gaussian, excess, sensitivity


def drawn(count: int, deviation: float, *, seed: int = 1) -> np.ndarray:
    return discrete_gaussian(np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64), deviation)


@pytest.mark.parametrize("deviation", [0.7, 1.0, 4.0, 33.3])
def test_each_number_comes_as_often_as_its_mass_says(deviation: float) -> None:
    count = 1_000_000
    found = drawn(count, deviation)
    places = np.arange(-int(3 * deviation) - 1, int(3 * deviation) + 2)
    mass = np.exp(-(places**2) / (2 * deviation**2))
    mass /= sum(math.exp(-(k**2) / (2 * deviation**2)) for k in range(-1000, 1001))
    counts = np.array([(found == place).sum() for place in places])
    chi_square = float(((counts - count * mass) ** 2 / (count * mass)).sum())
    assert abs(chi_square - len(places)) < 6 * math.sqrt(2 * len(places))


@pytest.mark.parametrize("deviation", [4.0, 250.0, 20_000.0])
def test_mean_and_deviation_are_right_within_a_hundredth(deviation: float) -> None:
    found = drawn(1_000_000, deviation)
    assert float(found.std()) == pytest.approx(deviation, rel=0.01)
    assert abs(float(found.mean())) < 5 * deviation / 1000


def test_the_smallest_and_largest_draws_are_the_ends_of_the_tails() -> None:
    ends = np.array([0, 2**63 - 1, 2**63, 2**64 - 1], dtype=np.uint64)
    low, left, right, high = discrete_gaussian(ends, 10.0)
    # A chance of 2**-64 more or less on one side.
    assert abs(low + high) <= 1 and 80 < high < 95 and left == 0 and right == 0


def test_the_noise_of_parties_adds_up_to_that_of_the_sum() -> None:
    total = sum(drawn(500_000, 5.0, seed=seed) for seed in range(6))
    assert float(np.std(total)) == pytest.approx(5.0 * math.sqrt(6), rel=0.01)


def test_rounding_never_moves_a_sum_by_more_than_is_counted() -> None:
    draw = np.random.default_rng(2)
    for size, step in ((10, 0.1), (1000, 0.01)):
        for _ in range(50):
            update = draw.standard_normal(size)
            update /= np.linalg.norm(update)
            rounded = np.floor(update / step + draw.random(size)) * step
            assert np.linalg.norm(rounded) <= sensitivity(1.0, step=step, size=size)


def test_what_the_sum_is_not_is_worth_nothing_above_the_least_deviation() -> None:
    assert excess(LEAST_DEVIATION, parties=50, size=10**7) < 1e-50
    # It would be, with less.
    assert excess(0.5, parties=50, size=10**7) > 1
    assert excess(1.0, parties=1, size=10) == 0
