"""Epsilon: known values, the library asked in another way, opacus, and noise that is never too little."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import warnings

import dp_accounting
import pytest
from dp_accounting.pld import privacy_loss_distribution
from tiny import THOROUGH

from fedllm.privacy.accountant import AccountantName, Mechanism, accountant_name, epsilon_of, noise_for

# (sampling rate, noise, steps) -> epsilon at 1e-5 by RDP and by PLD.
PINS = {
    (0.01, 1, 1000): (2.10, 1.83),
    (0.01, 0.6, 1000): (8.68, 7.43),
    (0.004, 1, 2500): (1.31, 1.06),
    (0.05, 1, 500): (8.30, 7.52),
    (1, 1, 10): (19.05, 17.86),
    (1, 3, 50): (13.13, 12.26),
    (1, 10, 50): (3.19, 2.94),
    (1, 30, 200): (2.03, 1.87),
}


def settings_of(count: int) -> list[tuple[float, float, int, float]]:
    draw = random.Random(8)
    return [
        (
            round(10 ** draw.uniform(-3, -0.3), 4),
            round(draw.uniform(0.7, 4), 3),
            draw.randrange(1, 1500),
            10 ** draw.uniform(-7, -4),
        )
        for _ in range(count)
    ]


def one(rate: float, noise: float, steps: int) -> list[Mechanism]:
    return [Mechanism(rate, noise, steps)]


@pytest.mark.parametrize("case", PINS)
def test_known_values(case: tuple[float, float, int]) -> None:
    for accountant, expected in zip(("RDP", "PLD"), PINS[case], strict=True):
        found = epsilon_of(one(*case), delta=1e-5, accountant=accountant)  # type: ignore[arg-type]
        assert found == pytest.approx(expected, abs=1e-2)


def by_distribution(rate: float, noise: float, steps: int, delta: float) -> float:
    """Return epsilon from the loss distribution itself, rounded up: no accountant and no event is in it."""
    loss = privacy_loss_distribution.from_gaussian_mechanism(noise, sampling_prob=rate, use_connect_dots=True)
    return float(loss.self_compose(steps).get_epsilon_for_delta(delta))


def by_opacus(rate: float, noise: float, steps: int, delta: float, *, whole: bool) -> float:
    from opacus.accountants.analysis import rdp

    orders = [order for order in dp_accounting.rdp.RdpAccountant()._orders if not whole or order == int(order)]
    # The best order may be the last one, which is warned of.
    with warnings.catch_warnings(action="ignore"):
        spent = rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=orders)
        return float(rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)[0])


def test_two_hundred_settings_are_never_below_others_and_at_most_one_percent_above() -> None:
    wrong = []
    for number, (rate, noise, steps, delta) in enumerate(settings_of(200)):
        found = epsilon_of(one(rate, noise, steps), delta=delta, accountant="RDP")
        # Between whole orders opacus sums a series, and dp-accounting takes a bound, which is above it.
        least, most = (by_opacus(rate, noise, steps, delta, whole=whole) for whole in (False, True))
        if not least * (1 - 1e-6) <= found <= most * 1.01:
            wrong.append(("RDP", rate, noise, steps, delta, found, least, most))
        if number % (4 if THOROUGH else 40) == 0:
            # Seconds each.
            tight = epsilon_of(one(rate, noise, steps), delta=delta, accountant="PLD")
            expected = by_distribution(rate, noise, steps, delta)
            if not expected * (1 - 1e-6) <= tight <= expected * 1.01 or tight > found * 1.001:
                wrong.append(("PLD", rate, noise, steps, delta, tight, expected))
    assert wrong == []


def test_prv_of_opacus_agrees() -> None:
    from opacus.accountants import PRVAccountant

    for rate, noise, steps, delta in settings_of(4):
        other = PRVAccountant()
        other.history = [(noise, rate, steps)]
        with warnings.catch_warnings(action="ignore"):
            expected = other.get_epsilon(delta=delta)
        # It is an estimate with an error of 0.01, rounded up.
        found = epsilon_of(one(rate, noise, steps), delta=delta, accountant="PLD")
        assert expected - 0.02 <= found <= expected * 1.01


@pytest.mark.parametrize("accountant", ["PLD", "RDP"])
@pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.0])
def test_noise_is_the_least_that_is_enough(accountant: AccountantName, epsilon: float) -> None:
    noise = noise_for(epsilon, delta=1e-5, sampling_rate=0.1, steps=60, accountant=accountant)
    assert epsilon_of(one(0.1, noise, 60), delta=1e-5, accountant=accountant) <= epsilon
    assert epsilon_of(one(0.1, noise * 0.997, 60), delta=1e-5, accountant=accountant) > epsilon


def test_all_sums_together_cost_more_than_each_and_less_than_both_added() -> None:
    first, second = Mechanism(0.05, 1.0, 200), Mechanism(0.1, 1.3, 100)

    def spent(*mechanisms: Mechanism) -> float:
        return epsilon_of(mechanisms, delta=1e-5, accountant="PLD")

    assert max(spent(first), spent(second)) < spent(first, second) < spent(first) + spent(second)
    assert spent(first, second) == spent(second, first)
    assert spent(Mechanism(0.05, 1.0, 120), Mechanism(0.05, 1.0, 80)) == spent(first)
    assert spent() == 0


def test_no_noise_is_enough_for_next_to_nothing() -> None:
    with pytest.raises(ValueError, match="no noise"):
        noise_for(1e-9, delta=1e-12, sampling_rate=1.0, steps=100_000, accountant="RDP")


def test_orders_that_do_not_converge_are_left_out_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert epsilon_of(one(0.26, 1.3, 41), delta=1e-5, accountant="RDP") > 0
    assert not caplog.records
    assert not logging.getLogger("absl").disabled


def test_the_name_says_which_version_computes() -> None:
    assert accountant_name("PLD") == f"PLD, dp-accounting {dp_accounting_version()}"


def dp_accounting_version() -> str:
    from importlib.metadata import version

    return version("dp-accounting")


def test_the_command_line_does_not_load_the_library_before_it_must() -> None:
    code = "import sys, fedllm.cli, fedllm.job.job; assert not {'dp_accounting', 'scipy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
