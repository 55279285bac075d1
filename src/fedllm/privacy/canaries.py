"""Canaries: random examples in a party's own format, planted to see what a run gives away of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedllm.data.formats import Example, Kind, Message
from fedllm.data.settings import DataSettings
from fedllm.data.tokens import TokenisedExample, no_target, tokenise
from fedllm.errors import ModelError
from fedllm.seeds import stream
from fedllm.tasks import CLASSIFICATION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_WORDS = 12


@dataclass(frozen=True)
class CanarySet:
    """A party's canaries, as tokens.

    Args:
        canaries: Those that might have been planted, m of them.
        included: Whether each was, by a fair coin, shape (m,), bool.
        decoys: More of the same kind, none of them planted: what the others are ranked among.
    """

    canaries: Sequence[TokenisedExample]
    included: np.ndarray
    decoys: Sequence[TokenisedExample]

    def planted(self, copies: int) -> list[TokenisedExample]:
        """Return what is added to the party's training examples.

        Args:
            copies: How often each canary is planted.
        """
        chosen = [canary for canary, is_in in zip(self.canaries, self.included, strict=True) if is_in]
        return chosen * copies


class CanaryMaker:
    """Makes canaries of one kind for one base model.

    Args:
        tokenizer: The base model's tokenizer: canaries are made of its words.
        settings: The job's `data` section, for the template and the length.
        seed: The job's seed. The same seed makes the same canaries, so they need not be written down.

    Raises:
        ModelError: `MODEL_NOT_FOUND`, the tokenizer has too few words that are readable text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, seed: int) -> None:
        self._tokenizer, self._settings, self._seed = tokenizer, settings, seed
        self._words = _readable_words(tokenizer)
        # Prompt and answer both fit, with room for what a template puts around them.
        self._length = max(2, min(_MOST_WORDS, settings.max_length // 4))

    def make(self, party: str, kind: Kind, *, number: int, decoys: int) -> CanarySet:
        """Return the canaries of a party.

        Args:
            party: The party.
            kind: The form of its own examples.
            number: How many may be planted.
            decoys: How many more to make.

        Raises:
            DataError: `DATA_NO_TARGET`, no token of a canary would be trained within `max_length`.
        """
        draws = stream(self._seed, "canaries", party, kind)
        # Where persons are hidden each canary is one, with all of its copies.
        made = [replace(self._tokens(self._example(draws, kind)), group=f"canary {i}") for i in range(number + decoys)]
        # Coins of their own: whoever knows the canaries knows nothing of what was planted.
        included = stream(self._seed, "canaries included", party).random(number) < 0.5
        return CanarySet(made[:number], included, made[number:])

    def _tokens(self, example: Example) -> TokenisedExample:
        found = tokenise(example, self._tokenizer, self._settings)
        if not found.num_targets:
            raise no_target(1, self._settings.max_length)
        return found

    def _example(self, draws: np.random.Generator, kind: Kind) -> Example:
        given, answer = self._text(draws), self._text(draws)
        if self._settings.task == CLASSIFICATION:
            return Example(prompt=f"{given} {answer}", completion=str(draws.choice(self._settings.label_names)))
        if kind == "chat":
            return Example(messages=(Message("user", given), Message("assistant", answer)))
        if kind == "text":
            return Example(text=f"{given} {answer}")
        return Example(prompt=f"{given} ", completion=answer)

    def _text(self, draws: np.random.Generator) -> str:
        return "".join(self._words[i] for i in draws.integers(0, len(self._words), self._length)).strip() or "canary"


def _readable_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that are printable text of their own, in the order of their numbers."""
    special = set(tokenizer.all_special_ids)
    texts = (str(tokenizer.decode([number])) for number in range(len(tokenizer)) if number not in special)
    # A token that is a part of a character reads as a replacement sign.
    words = [text for text in texts if text.strip() and text.isprintable() and "\ufffd" not in text]
    if len(words) < 2:
        raise ModelError(
            "MODEL_NOT_FOUND",
            f"the tokenizer has {len(words)} readable words: no canary can be made of them",
            fix="copy the base model again, with its tokenizer",
        )
    return words
