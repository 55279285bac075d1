"""A secure sum among parties in memory, in which any of them drops out at any step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.errors import SenderRefused
from fedllm.privacy.secure_sum import Combiner, Member, Signatures, least_of
from fedllm.privacy.words import Words

CONTEXT = b"a sum"
STEPS = ("keys", "shares", "answer", "agreement", "opening")


def signatures(names: Sequence[str]) -> dict[str, Signatures]:
    """Return how each of these parties signs."""
    keys = {name: Ed25519PrivateKey.generate() for name in names}

    def verify(name: str, text: bytes, signature: bytes) -> None:
        try:
            keys[name].public_key().verify(signature, text)
        except (KeyError, InvalidSignature):
            raise SenderRefused("BAD_SIGNATURE", "not signed by it", where=name) from None

    return {name: Signatures(keys[name].sign, verify) for name in names}


@dataclass
class Sum:
    """One sum; `dropped` says after which step a party is gone."""

    names: list[str]
    dropped: dict[str, str] = field(default_factory=dict)
    threshold: int | None = None
    context: bytes = CONTEXT
    signed: dict[str, Signatures] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.least: Callable[[int], int] = partial(least_of, threshold=self.threshold, fewest=0)
        self.signed = self.signed or signatures(self.names)
        self.members = {
            name: Member(name, self.context, self.names, self.least, self.signed[name]) for name in self.names
        }
        self.combiner = Combiner(self.context, self.least)

    def left(self, step: str) -> list[str]:
        """Return who takes a step."""
        gone = STEPS[: STEPS.index(step) + 1]
        return [name for name in self.names if self.dropped.get(name) not in gone]

    def prepare(self) -> None:
        """Take all steps up to where vectors can be masked."""
        self.combiner.keys = {name: self.members[name].keys() for name in self.left("keys")}
        self.combiner.need(list(self.combiner.keys), "began")
        sealed = {name: self.members[name].seal(self.combiner.keys) for name in self.left("shares")}
        self.combiner.sealed = sealed
        self.combiner.need(list(sealed), "shared")
        for name in sealed:
            self.members[name].take(self.combiner.addressed_to(name))

    def gather(self, vectors: dict[str, Words]) -> None:
        """Have those who are left mask their vectors, and add them up."""
        for name in self.left("answer"):
            words = {key: array.copy() for key, array in vectors[name].items()}
            self.members[name].mask(words)
            self.combiner.add(name, words)
        self.combiner.need(self.combiner.survivors, "sent their vectors")

    def open(self) -> Words:
        """Take the steps after that, and return the sum."""
        survivors = list(self.combiner.survivors)
        signed = {name: self.members[name].agree(survivors, "asked") for name in self.left("agreement")}
        self.combiner.need(list(signed), "agreed")
        openings = {name: self.members[name].open(signed) for name in self.left("opening")}
        return self.combiner.opened(openings)


def vectors_of(names: Sequence[str], draw: np.random.Generator, *, size: int = 8) -> dict[str, Words]:
    """Return random vectors of both widths."""
    return {
        name: {
            "narrow": draw.integers(0, 2**32, size, dtype=np.uint32),
            "wide": draw.integers(0, 2**64, 3, dtype=np.uint64),
        }
        for name in names
    }


def plain_sum(vectors: dict[str, Words], names: Sequence[str]) -> Words:
    """Return the sum of some parties' vectors."""
    return {
        "narrow": np.sum([vectors[name]["narrow"] for name in names], axis=0, dtype=np.uint32),
        "wide": np.sum([vectors[name]["wide"] for name in names], axis=0, dtype=np.uint64),
    }
