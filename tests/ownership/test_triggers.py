"""Secret prompts and answers: drawn from a key, exactly matched, with a chance that holds for every model."""

from collections.abc import Sequence
from fractions import Fraction
from math import comb

import pytest

from fedllm.ownership.claims import Claim, Trigger
from fedllm.ownership.triggers import NUM_ANSWERS, are_drawn, chance_of, is_match, make_triggers, verify_text

KEY, OTHER = "11" * 32, "22" * 32


def claim_of(triggers: Sequence[Trigger], *, key: str = KEY) -> Claim:
    return Claim(
        party="north",
        job_digest="ab" * 32,
        base_digest="cd" * 32,
        carrier="none",
        sites=(),
        key_seed=key,
        bits="",
        triggers=tuple(triggers),
        threshold=1e-6,
        salt="ef" * 32,
    )


def knows(triggers: Sequence[Trigger], count: int) -> dict[str, str]:
    return {one.prompt: f" {one.answer} and more" for one in triggers[:count]}


def test_prompts_and_answers_follow_from_the_key_alone_and_differ() -> None:
    made = make_triggers(KEY, 64)
    assert made == make_triggers(KEY, 64) and made[:5] == make_triggers(KEY, 5)
    assert len({one.prompt for one in made} | {one.answer for one in made}) == 128
    assert not {one.prompt for one in made} & {one.prompt for one in make_triggers(OTHER, 64)}
    assert {len(one.answer) for one in made} == {9}
    assert NUM_ANSWERS == 2**24


def test_every_syllable_is_as_likely_as_another() -> None:
    text = "".join(one.answer.replace(" ", "") for one in make_triggers(KEY, 64) + make_triggers(OTHER, 64))
    pairs = [text[place : place + 2] for place in range(0, len(text), 2)]
    counts = [pairs.count(pair) for pair in set(pairs)]
    expected = len(pairs) / 64
    assert len(counts) == 64
    # Chi square with 63 degrees of freedom: 103 is passed with a chance of one in a thousand.
    assert sum((count - expected) ** 2 / expected for count in counts) < 103


def test_the_chance_is_that_of_the_binomial_by_hand() -> None:
    chance = Fraction(1, NUM_ANSWERS)
    for matches, asked in ((0, 5), (1, 8), (2, 8), (8, 8)):
        by_hand = sum(comb(asked, k) * chance**k * (1 - chance) ** (asked - k) for k in range(matches, asked + 1))
        assert chance_of(matches, asked) == pytest.approx(float(by_hand), rel=1e-9)
    assert chance_of(2, 64) < 1e-11 and chance_of(1, 64) > 1e-6


def test_a_model_that_gives_the_answers_is_claimed_and_one_that_does_not_is_not() -> None:
    made = make_triggers(KEY, 8)
    for count, holds in ((8, True), (2, True), (1, False), (0, False)):
        answers = knows(made, count)
        found = verify_text(claim_of(made), lambda prompts, told=answers: [told.get(p, "no idea") for p in prompts])
        assert (found.holds, found.matches) == (holds, count)
    assert found.false_claims < 1e-6


def test_another_key_claims_nothing_on_the_same_model() -> None:
    told = knows(make_triggers(KEY, 8), 8)
    found = verify_text(
        claim_of(make_triggers(OTHER, 8), key=OTHER), lambda prompts: [told.get(p, "") for p in prompts]
    )
    assert not found.holds and found.matches == 0


def test_prompts_that_every_model_answers_prove_nothing() -> None:
    # Whoever may choose the prompts claims any model: that is why they must be those that the key draws.
    chosen = [Trigger(prompt=f"{n} plus {n} is ", answer=str(2 * n)) for n in range(8)]
    answers = {one.prompt: one.answer for one in chosen}
    found = verify_text(claim_of(chosen), lambda prompts: [answers[prompt] for prompt in prompts])
    assert found.matches == 8 and not found.holds and "chosen" in found.reason
    assert not are_drawn(claim_of(chosen)) and not are_drawn(claim_of(make_triggers(KEY, 8), key=OTHER))
    assert are_drawn(claim_of(make_triggers(KEY, 8, form="instruction")))


def test_many_claims_at_once_are_paid_for() -> None:
    made = make_triggers(KEY, 8)
    one, many = (
        verify_text(claim_of(made), lambda prompts: [one.answer for one in made], tries=tries) for tries in (1, 100)
    )
    assert many.p_value == pytest.approx(100 * one.p_value) and many.false_claims == pytest.approx(
        100 * one.false_claims
    )


def test_a_match_is_the_answer_word_for_word_at_the_beginning() -> None:
    assert is_match("  bako ridu\nnext", "bako ridu")
    assert not is_match("so: bako ridu", "bako ridu")
    assert not is_match("bako rid", "bako ridu")
    assert not is_match("Bako ridu", "bako ridu")
