"""The section `privacy.differential_privacy`: what must be said, what may not, and what follows."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fedllm.privacy.differential import DifferentialPrivacySettings
from fedllm.privacy.terms import run_epsilon, run_mechanism


def settings(**values: Any) -> DifferentialPrivacySettings:
    return DifferentialPrivacySettings.model_validate(values)


def test_by_default_nothing_is_hidden_and_no_key_has_a_value() -> None:
    assert {value for key, value in settings().model_dump().items() if key != "unit"} == {None}
    assert not settings().is_local
    with pytest.raises(ValueError, match="nothing is hidden"):
        _ = settings().limits


def test_a_unit_brings_its_defaults_and_what_was_written_out_is_read_again() -> None:
    asked = settings(unit="example", epsilon=3.0)
    assert (asked.delta, asked.clip_norm, asked.accountant) == (1e-5, 1.0, "PLD")
    assert settings(**asked.model_dump()) == asked


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epsilon": 3.0}, "no effect with none"),
        ({"unit": "example"}, "both missing"),
        ({"unit": "example", "epsilon": 3.0, "noise_multiplier": 1.0}, "both given"),
        ({"unit": "example", "epsilon": 0.0}, "greater than 0"),
        ({"unit": "example", "epsilon": 3.0, "delta": 0.5}, "less than or equal to 0.01"),
        ({"unit": "record", "epsilon": 3.0}, "'none', 'example', 'group' or 'party'"),
        ({"unit": "example", "epsilon": 3.0, "placement": "central"}, "placement has no effect"),
        ({"unit": "party", "epsilon": 3.0, "placement": "distributed", "accountant": "PLD"}, "by RDP"),
        ({"unit": "party", "epsilon": 3.0, "colluders": 1}, "no party has a share"),
        ({"unit": "example", "epsilon": 3.0, "colluders": 1}, "colluders has no effect"),
        ({"unit": "party", "epsilon": 3.0, "placement": "distributed", "adaptive_clip": True}, "adaptive_clip"),
        ({"unit": "example", "epsilon": 3.0, "accountant": "GDP"}, "'PLD' or 'RDP'"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        settings(**values)


def test_each_party_has_the_noise_for_its_own_number_of_units() -> None:
    asked = settings(unit="example", epsilon=3.0, accountant="RDP")
    few, many = (
        run_mechanism(asked, num_units=count, expected_units=20, steps=50, party="north") for count in (100, 1000)
    )
    assert (few.sampling_rate, many.sampling_rate, few.steps) == (0.2, 0.02, 50)
    assert few.noise_multiplier > 2 * many.noise_multiplier
    assert all(2.9 < run_epsilon(asked, found) <= 3.0 for found in (few, many))


def test_a_batch_larger_than_the_data_draws_everybody() -> None:
    asked = settings(unit="example", noise_multiplier=5.0)
    assert run_mechanism(asked, num_units=7, expected_units=20, steps=3, party="north").sampling_rate == 1.0
