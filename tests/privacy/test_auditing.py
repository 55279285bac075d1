"""The one-run audit: published figures, validity on a mechanism that is known, and attacks that rank by loss."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedllm.privacy.auditing import (
    SHARES,
    SIGNIFICANCE,
    Guesses,
    epsilon_lower_bound,
    group_claim,
    guess,
    largest_bound,
    one_run_audit,
    p_value,
)
from fedllm.privacy.membership import area_under_curve, excess_losses, exposure, membership, true_positives
from fedllm.seeds import stream


@pytest.mark.parametrize(
    ("m", "r", "v", "delta", "epsilon"),
    [
        (1000, 1000, 600, 1e-5, 0.2972),
        (1000, 1000, 900, 1e-5, 2.0206),
        (1000, 100, 100, 1e-5, 3.4654),
        (500, 500, 500, 1e-5, 5.101),
        (200, 40, 40, 0.0, 2.554),
    ],
)
def test_lower_bounds_are_those_of_the_paper(m: int, r: int, v: int, delta: float, epsilon: float) -> None:
    assert epsilon_lower_bound(Guesses(m, r, v), delta) == pytest.approx(epsilon, abs=6e-4)


def reference_p_value(found: Guesses, epsilon: float, delta: float) -> float:
    """The p-value as the paper's appendix writes it, from whole binomial coefficients."""
    r, v = found.guesses, found.correct
    right, wrong = -math.log1p(math.exp(-epsilon)), -math.log1p(math.exp(epsilon))
    mass = [math.exp(math.log(math.comb(r, i)) + i * right + (r - i) * wrong) for i in range(r + 1)]
    alpha = max((sum(mass[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, sum(mass[v:]) + 2 * found.canaries * delta * alpha)


@pytest.mark.parametrize("delta", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize(("m", "r", "v"), [(50, 50, 0), (50, 20, 1), (300, 120, 119), (2000, 1500, 1400)])
def test_p_values_are_those_of_a_reference(m: int, r: int, v: int, delta: float) -> None:
    for epsilon in (0.0, 0.3, 2.0, 8.0):
        found = Guesses(m, r, v)
        assert p_value(found, epsilon, delta) == pytest.approx(reference_p_value(found, epsilon, delta), rel=1e-6)


def test_the_bound_stands_where_the_p_value_crosses_the_significance() -> None:
    found = Guesses(400, 100, 92)
    bound = epsilon_lower_bound(found, 1e-5)
    assert p_value(found, bound - 1e-6, 1e-5) < SIGNIFICANCE <= p_value(found, bound + 1e-6, 1e-5)


def test_guesses_at_chance_bound_nothing() -> None:
    assert epsilon_lower_bound(Guesses(1000, 1000, 500), 1e-5) == 0.0
    assert epsilon_lower_bound(Guesses(1000, 1000, 0), 1e-5) == 0.0


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0])
def test_the_bound_passes_the_truth_in_at_most_one_audit_of_twenty(epsilon: float) -> None:
    """Randomised response is right with probability e^eps / (1 + e^eps), the most that eps allows."""
    draws = stream(0, "test", "randomised response", int(10 * epsilon))
    right = draws.binomial(200, 1 / (1 + math.exp(-epsilon)), size=2000)
    bounds = {int(v): epsilon_lower_bound(Guesses(200, 200, int(v)), 0.0) for v in set(right)}
    share = float(np.mean([bounds[int(v)] > epsilon for v in right]))
    # Three standard errors of 2000 audits.
    assert 0 < share <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_choosing_how_many_to_guess_keeps_the_bound_valid() -> None:
    """The best of three choices would pass too often without its share of the significance."""
    draws = stream(0, "test", "laplace scores")
    epsilon, passed = 1.0, 0
    for _ in range(400):
        included = draws.random(200) < 0.5
        # One of two inputs a unit apart with Laplace noise of scale 1/eps: eps-differentially private.
        scores = included + draws.laplace(scale=1 / epsilon, size=200)
        passed += one_run_audit(scores, included, delta=0.0).epsilon > epsilon
    assert passed / 400 <= 0.05


def test_guesses_come_from_both_ends() -> None:
    scores = np.array([5.0, -3.0, 1.0, 0.5, -4.0, 9.0])
    included = np.array([False, False, True, True, True, True])
    assert guess(scores, included, 2) == Guesses(6, 2, 1)
    assert guess(scores, included, 4) == Guesses(6, 4, 2)


def test_an_audit_of_perfect_scores_finds_what_so_many_canaries_can_show() -> None:
    included = stream(0, "test", "coins").random(100) < 0.5
    found = one_run_audit(included.astype(float), included, delta=0.0)
    # Half of the guesses from either end: as the coins do not fall even, a few are wrong of all, none of thirty.
    best = max(epsilon_lower_bound(guess(included * 1.0, included, r), 0.0, significance=SIGNIFICANCE / len(SHARES))
               for r in (10, 30, 100))  # fmt: skip
    assert found.epsilon == best > 1.9
    assert found.epsilon <= largest_bound(100, 0.0)


def test_the_largest_bound_is_that_of_right_guesses_and_even_coins() -> None:
    included = np.arange(100) % 2 == 0
    assert one_run_audit(included * 1.0, included, delta=1e-5).epsilon == largest_bound(100, 1e-5)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_group_is_promised_less(size: int) -> None:
    epsilon, delta = group_claim(1.0, 1e-6, size)
    assert epsilon == size
    assert delta == pytest.approx(1e-6 * (math.exp(size) - 1) / (math.e - 1))


def test_exposure_of_a_hand_made_ranking() -> None:
    reference = np.arange(1.0, 8.0)
    # Best of eight, tied with the best, and worst of eight.
    assert exposure(np.array([0.5, 1.0, 9.0]), reference).tolist() == pytest.approx([3.0, 2.0, 0.0])


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_excess_losses_take_out_what_the_base_model_foretells_and_no_more(slope: float) -> None:
    draws = stream(0, "test", "excess")
    base, own = draws.normal(16, 3, 500), draws.normal(0, 0.1, 500)
    own[:50] -= 0.5
    found = excess_losses(6 + slope * base + own, base, number=400)
    np.testing.assert_allclose(found - own, (found - own).mean(), atol=0.05)
    assert area_under_curve(-found[:50], -found[50:]) > 0.99
    # With the difference alone it is found for slope 1 only.
    assert (area_under_curve((base - 6 - slope * base - own)[:50], (base - 6 - slope * base - own)[50:]) > 0.99) is (
        slope == 1
    )


def test_area_under_the_curve_by_counting_pairs() -> None:
    draws = stream(0, "test", "auc")
    members, others = draws.integers(0, 9, 40) * 1.0, draws.integers(0, 6, 70) * 1.0
    pairs = [(a > b) + 0.5 * (a == b) for a in members for b in others]
    assert area_under_curve(members, others) == pytest.approx(np.mean(pairs))


def test_true_positives_at_a_false_positive_rate() -> None:
    others = np.arange(200.0)
    members = np.array([198.5, 197.0, 197.5, 500.0])
    # Two of 200 may pass: the threshold is 197.
    assert true_positives(members, others, false_positives=0.01) == 0.75
    assert membership(members, others).tpr_at_1_fpr == 0.75
    assert membership(members, others[:99]).tpr_at_1_fpr is None


def test_the_standard_error_of_an_auc_is_that_of_repeated_draws() -> None:
    draws = stream(0, "test", "auc error")
    found = [membership(draws.normal(0.5, 1, 60), draws.normal(0, 1, 80)) for _ in range(500)]
    assert np.std([each.auc for each in found]) == pytest.approx(np.mean([each.auc_error for each in found]), rel=0.1)
