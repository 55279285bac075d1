"""How much privacy a training run lost at least: a lower bound of epsilon from one run with canaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIGNIFICANCE = 0.05
# Which share of the canaries is guessed: few sure guesses show a large epsilon, many unsure ones a small one.
SHARES = (0.1, 0.3, 1.0)
_LARGEST = 50.0


@dataclass(frozen=True)
class Guesses:
    """How many canaries there were, for how many it was guessed whether they were trained on, and how many rightly."""

    canaries: int
    guesses: int
    correct: int


@dataclass(frozen=True)
class LowerBound:
    """A lower bound of epsilon that holds with probability 1 - `SIGNIFICANCE`, and the guesses behind it."""

    epsilon: float
    delta: float
    best: Guesses


def p_value(found: Guesses, epsilon: float, delta: float) -> float:
    """Return a bound of the probability of so many right guesses under (epsilon, delta)-differential privacy.

    Source: Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, theorem 5.2 and algorithm 1. Differs: no.

    Args:
        found: The guesses.
        epsilon: In nats, >= 0.
        delta: In [0, 1].
    """
    return _p_value(found, _log_choose(found.guesses), epsilon, delta)


def epsilon_lower_bound(found: Guesses, delta: float, *, significance: float = SIGNIFICANCE) -> float:
    """Return the largest epsilon that the guesses refute: sup{epsilon: p < significance}, 0 if none.

    Args:
        found: The guesses.
        delta: In [0, 1].
        significance: Probability with which a mechanism of a smaller epsilon may be found to have a larger one.
    """
    log_choose = _log_choose(found.guesses)
    low, high = 0.0, _LARGEST
    if _p_value(found, log_choose, low, delta) >= significance:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        is_refuted = _p_value(found, log_choose, middle, delta) < significance
        low, high = (middle, high) if is_refuted else (low, middle)
    return low


def guess(scores: np.ndarray, included: np.ndarray, guesses: int) -> Guesses:
    """Return how the guesses fare that call the highest scores trained on, and the lowest not.

    Args:
        scores: One per canary, shape (m,); higher where the model seems to know it.
        included: Whether each was trained on, shape (m,), bool.
        guesses: How many canaries to guess, an even number; half of them from either end.
    """
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    out, into = order[:half], order[len(order) - half :]
    return Guesses(len(scores), 2 * half, int((~included[out]).sum() + included[into].sum()))


def one_run_audit(
    scores: np.ndarray, included: np.ndarray, *, delta: float, shares: Sequence[float] = SHARES
) -> LowerBound:
    """Return a lower bound of epsilon from the scores of canaries that were each included with probability 1/2.

    How many are guessed is chosen after the fact, so each of the choices is judged at its part of the significance
    (Bonferroni): the bound holds whichever is best.

    Args:
        scores: One per canary, shape (m,); higher where the model seems to know it.
        included: Whether each was trained on, shape (m,), bool.
        delta: The delta of the claim, in [0, 1].
        shares: Which shares of the canaries to guess, each in (0, 1].
    """
    tried = []
    for number in sorted({2 * max(1, round(share * len(scores) / 2)) for share in shares}):
        found = guess(scores, included, min(number, len(scores)))
        bound = epsilon_lower_bound(found, delta, significance=SIGNIFICANCE / len(shares))
        tried.append(LowerBound(bound, delta, found))
    return max(tried, key=lambda bound: (bound.epsilon, bound.best.guesses))


def largest_bound(canaries: int, delta: float, *, shares: Sequence[float] = SHARES) -> float:
    """Return the bound that an audit finds whose every guess is right: so many canaries can show no larger one.

    Args:
        canaries: How many, m.
        delta: The delta of the claim, in [0, 1].
        shares: As for `one_run_audit`.
    """
    return epsilon_lower_bound(Guesses(canaries, canaries, canaries), delta, significance=SIGNIFICANCE / len(shares))


def group_claim(epsilon: float, delta: float, size: int) -> tuple[float, float]:
    """Return what (epsilon, delta) for one example promises for a group of examples.

    Source: Dwork and Roth 2014, theorem 2.2, with the exact sum for delta: k epsilon, delta (e^(k epsilon) - 1) /
    (e^epsilon - 1).

    Args:
        epsilon: For one example, >= 0.
        delta: For one example.
        size: Examples in the group, k >= 1.
    """
    if size == 1:
        return epsilon, delta
    factor = sum(math.exp(min(epsilon * i, 700.0)) for i in range(size))
    return size * epsilon, min(1.0, delta * factor)


def _log_choose(guesses: int) -> np.ndarray:
    """Return log C(r, i) for i = 0..r."""
    log_factorial = np.array([math.lgamma(i + 1) for i in range(guesses + 1)])
    found: np.ndarray = log_factorial[-1] - log_factorial - log_factorial[::-1]
    return found


def _p_value(found: Guesses, log_choose: np.ndarray, epsilon: float, delta: float) -> float:
    number = np.arange(found.guesses + 1)
    # log q and log(1 - q) for q = 1 / (1 + e^-epsilon), without a loss of digits where q is near 1.
    log_right = -math.log1p(math.exp(-epsilon))
    mass = np.exp(log_choose + number * log_right + (found.guesses - number) * (log_right - epsilon))
    beta = float(mass[found.correct :].sum())
    if not found.correct:
        return 1.0
    # P[v - i <= X < v] / i for i = 1..v.
    below = np.cumsum(mass[: found.correct][::-1]) / np.arange(1, found.correct + 1)
    return min(1.0, beta + 2 * found.canaries * delta * float(below.max()))
