"""Whether a model gives away what it was trained on: membership inference, and the exposure of canaries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Below so many non-members a false-positive rate of 1 % is less than one example.
_FEWEST_FOR_TPR = 100


@dataclass(frozen=True)
class Membership:
    """How well scores tell members from non-members.

    `auc` is 0.5 for an attack that knows nothing; `auc_error` is its standard error. `tpr_at_1_fpr` is the share of
    members found where at most 1 % of the non-members are taken for one; None with fewer than 100 non-members.
    """

    members: int
    non_members: int
    auc: float
    auc_error: float
    tpr_at_1_fpr: float | None


def membership(members: np.ndarray, non_members: np.ndarray) -> Membership:
    """Return how well scores tell members from non-members.

    The scores are an attack's: for instance the loss of a reference model less that of the tuned one, which is LiRA's
    likelihood ratio with one reference model in place of many (Carlini et al. 2022, arXiv:2112.03570, section 5).
    The standard error is that of Hanley and McNeil 1982.

    Args:
        members: Scores of what was trained on, shape (p,), p >= 1; higher = rather a member.
        non_members: Scores of what was not, shape (n,), n >= 1.
    """
    p, n = len(members), len(non_members)
    auc = area_under_curve(members, non_members)
    both, other = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (p - 1) * (both - auc**2) + (n - 1) * (other - auc**2)) / (p * n)
    rate = true_positives(members, non_members, false_positives=0.01) if n >= _FEWEST_FOR_TPR else None
    return Membership(p, n, auc, math.sqrt(max(variance, 0.0)), rate)


def area_under_curve(members: np.ndarray, non_members: np.ndarray) -> float:
    """Return the probability that a member scores higher than a non-member, ties counting one half.

    Args:
        members: Scores, shape (p,).
        non_members: Scores, shape (n,).
    """
    ordered = np.sort(non_members)
    below = np.searchsorted(ordered, members, side="left")
    not_above = np.searchsorted(ordered, members, side="right")
    return float((below + not_above).mean() / (2 * len(non_members)))


def true_positives(members: np.ndarray, non_members: np.ndarray, *, false_positives: float) -> float:
    """Return the share of members above the threshold that at most a share of the non-members pass.

    Args:
        members: Scores, shape (p,).
        non_members: Scores, shape (n,).
        false_positives: The share, in [0, 1).
    """
    allowed = math.floor(false_positives * len(non_members))
    threshold = np.sort(non_members)[len(non_members) - 1 - allowed]
    return float((members > threshold).mean())


def excess_losses(tuned: np.ndarray, base: np.ndarray, *, number: int) -> np.ndarray:
    """Return by how much each loss under the tuned model is above what its loss under the base model lets expect.

    What to expect is a straight line through the examples that were certainly not trained on. How much a base model's
    loss says differs: a little tuning leaves it as it is (slope 1), and of random text a tuned model may have learnt
    no more than that it is random (slope 0).

    Args:
        tuned: Losses in nats, shape (n,).
        base: Losses of the same examples under the base model, shape (n,).
        number: How many of the examples, the last ones, were certainly not trained on; at least 2.
    """
    before, after = base[-number:], tuned[-number:]
    spread = float(((before - before.mean()) ** 2).sum())
    slope = float(((before - before.mean()) * (after - after.mean())).sum()) / spread if spread else 0.0
    found: np.ndarray = tuned - after.mean() - slope * (base - before.mean())
    return found


def exposure(losses: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the exposure of each canary in bits: log2 |R| - log2 rank, shape (m,).

    The rank of a canary is its place by loss among the reference and itself, from 1; a tie counts against the canary.
    So |R| is the size of the reference and 1, and no exposure is above log2 |R|, which says that no reference is
    liked better.

    Source: Carlini et al. 2019, arXiv:1802.08232, definition 5. Differs: R is a sample of the canaries that might have
    been planted and not all of them, as in their section 5.3.

    Args:
        losses: Of the canaries, in nats, shape (m,).
        reference: Losses of canaries of the same kind that were not trained on, shape (k,).
    """
    ranks = 1 + np.searchsorted(np.sort(reference), losses, side="right")
    found: np.ndarray = math.log2(len(reference) + 1) - np.log2(ranks)
    return found
