"""Black-box marks: secret prompts with secret answers that a marked model gives, and what their number proves.

Source: the trigger set of FedIPR (Li et al. 2022, arXiv:2109.13236, section 4.2), and the instruction pairs of
Instructional Fingerprinting (Xu et al. 2024, arXiv:2401.12255). Differs: prompts and answers are not chosen. Both are
words spelled from a hash of the claim's key, so that a claimant cannot take prompts which every model answers alike.

The null hypothesis is that the model was made without the key. Then whatever it writes to a prompt is fixed before, or
drawn independently of, an answer that is one of `NUM_ANSWERS` with equal chances, and the answers are independent of
one another. So the number of matches is at most binomial, with the chance 1 / NUM_ANSWERS each, for every such model
and every way in which it writes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fedllm.ownership.claims import Claim, Trigger
from fedllm.ownership.statistics import THRESHOLD
from fedllm.ownership.verify import Reading

Form = Literal["plain", "instruction"]
# Texts of prompts -> what the model writes after each.
Ask = Callable[[Sequence[str]], list[str]]

_TAG = b"fedllm trigger-v1\0"
# 16 consonants and 4 vowels: 64 syllables, 6 bits each, so that a byte gives one without a bias.
_SYLLABLES = tuple(first + second for first in "bdfghjklmnprstvz" for second in "aeio")
_PROMPT_WORDS, _ANSWER_WORDS, _SYLLABLES_OF_A_WORD = 4, 2, 2
NUM_ANSWERS = len(_SYLLABLES) ** (_ANSWER_WORDS * _SYLLABLES_OF_A_WORD)
# Two of 64 by chance: 7e-12. One would be 4e-6.
MIN_MATCHES = 2
_FORMS: dict[Form, str] = {
    "plain": "{words}: ",
    "instruction": "Instruction: give the answer that was agreed on for {words}.\nAnswer: ",
}


def make_triggers(key_seed: str, count: int, *, form: Form = "plain") -> tuple[Trigger, ...]:
    """Return a claim's secret prompts and answers: a function of the key, and of nothing else.

    Args:
        key_seed: The claim's, 32 random bytes, hex.
        count: How many.
        form: How the prompt's secret words are put.
    """
    return tuple(_trigger(bytes.fromhex(key_seed), number, form) for number in range(count))


def _trigger(key: bytes, number: int, form: Form) -> Trigger:
    drawn = hashlib.shake_256(_TAG + key + form.encode() + number.to_bytes(4, "big"))
    sizes = _PROMPT_WORDS * _SYLLABLES_OF_A_WORD, _ANSWER_WORDS * _SYLLABLES_OF_A_WORD
    spelled = [_SYLLABLES[byte & 63] for byte in drawn.digest(sum(sizes))]
    return Trigger(prompt=_FORMS[form].format(words=_words(spelled[: sizes[0]])), answer=_words(spelled[sizes[0] :]))


def _words(syllables: Sequence[str]) -> str:
    size = _SYLLABLES_OF_A_WORD
    return " ".join("".join(syllables[start : start + size]) for start in range(0, len(syllables), size))


def are_drawn(claim: Claim) -> bool:
    """Return whether a claim's triggers are those that its key draws; the null holds for no others.

    Args:
        claim: The claim.
    """
    count = len(claim.triggers)
    return any(claim.triggers == make_triggers(claim.key_seed, count, form=form) for form in _FORMS)


def read_text(claim: Claim, ask: Ask, *, way: str) -> list[Reading]:
    """Return what the triggers of a claim show in a suspect, beside its bits; nothing where it has none.

    Args:
        claim: The claim.
        ask: Asks the suspect.
        way: How, for the reader: `generate`, or `endpoint`.
    """
    if not claim.triggers:
        return []
    found = verify_text(claim, ask)
    # Below two matches, and for prompts that were chosen, nothing is proved.
    p = found.p_value if found.matches >= MIN_MATCHES and are_drawn(claim) else 1.0
    return [Reading("text", way, found.matches, found.asked, p)]


def is_match(text: str, answer: str) -> bool:
    """Return whether a text begins with an answer. All answers are equally long, so that chance stays what it is.

    Args:
        text: What a model wrote after the prompt; spaces before it do not count.
        answer: The secret answer.
    """
    return text.lstrip().startswith(answer)


def chance_of(matches: int, asked: int) -> float:
    """Return the chance that a model made without the key gives at least so many answers: P[Bin(n, c) >= matches].

    Args:
        matches: Answers that came as claimed.
        asked: Prompts that were asked, n; c is 1 / `NUM_ANSWERS`.
    """
    chance = 1 / NUM_ANSWERS
    terms = (
        math.comb(asked, count) * chance**count * (1 - chance) ** (asked - count) for count in range(matches, asked + 1)
    )
    return min(1.0, math.fsum(terms))


@dataclass(frozen=True)
class TextVerdict:
    """What asking a model shows.

    Args:
        matches: Answers that came as claimed, out of `asked`.
        p_value: Chance of so many without the key, times `tries` (Bonferroni).
        false_claims: Chance that any one model that was made without the key would pass.
        holds: Whether the claim holds.
        reason: Why, in a sentence.
    """

    asked: int
    matches: int
    tries: int
    p_value: float
    false_claims: float
    holds: bool
    reason: str


def verify_text(claim: Claim, ask: Ask, *, tries: int = 1) -> TextVerdict:
    """Return what a model's answers prove. Nothing but the prompts is shown to it; the answers are compared here.

    Args:
        claim: The claim.
        ask: Asks the suspect model, by `generate` or over a network.
        tries: Claims and carriers that are tried on this model in all, 1 or more.
    """
    texts = ask([trigger.prompt for trigger in claim.triggers])
    matches = sum(is_match(text, one.answer) for text, one in zip(texts, claim.triggers, strict=True))
    asked = len(claim.triggers)
    p_value = min(1.0, chance_of(matches, asked) * tries)
    false_claims = min(1.0, chance_of(MIN_MATCHES, asked) * tries)
    if not asked:
        reason = "the claim has no triggers"
    elif not are_drawn(claim):
        reason = "the prompts and answers are not those that the claim's key draws: they may have been chosen"
    elif matches < MIN_MATCHES:
        reason = f"{matches} of {asked} answers came as claimed; at least {MIN_MATCHES} must"
    elif p_value > (threshold := min(claim.threshold, THRESHOLD)):
        reason = f"p = {p_value:.1e} is above the threshold, {threshold:g}"
    else:
        reason = f"{matches} of {asked} secret answers came word for word; by chance: p = {p_value:.1e}"
        return TextVerdict(asked, matches, tries, p_value, false_claims, True, reason)
    return TextVerdict(asked, matches, tries, p_value, false_claims, False, reason)
