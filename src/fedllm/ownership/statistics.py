"""What matches prove: exact p-values, corrected for the number of tries."""

from __future__ import annotations

from fractions import Fraction
from math import comb

# Largest p-value, after correction, of a claim that an arbiter upholds. A claim's own threshold may only be stricter.
THRESHOLD, MAX_THRESHOLD = 1e-6, 0.01


def p_value(matches: int, num_bits: int) -> float:
    """Return the chance that a key without a mark reads at least so many bits right: P[Bin(N, 1/2) >= matches].

    Exact, in whole numbers. Source: FedIPR (Li et al. 2022, arXiv:2109.13236), equation 9.

    Args:
        matches: Bits that read as committed.
        num_bits: N; 0 bits prove nothing.
    """
    ways = sum(comb(num_bits, count) for count in range(matches, num_bits + 1))
    return float(Fraction(ways, 2**num_bits))


def corrected(p: float, tries: int) -> float:
    """Return a p-value for the best of several tries (Bonferroni).

    Args:
        p: The smallest of them.
        tries: How many there were.
    """
    return min(1.0, p * tries)
