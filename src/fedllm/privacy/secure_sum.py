"""Secure aggregation: the server opens the sum of what parties send, and sees nothing of any part of it.

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS, figure 4,
with its consistency round and signatures (section 6, active adversaries). Differs: a party also signs the digest of its
own seed, so that a wrong share is found instead of spoiling the sum; a party signs what it was asked to sum beside who
is in it, so that a server that asks two parties for different things gets nothing; masks are AES-256-CTR.

A `Member` is a party's half of one sum, a `Combiner` the server's. Neither does any input or output, nor are they ever
written to disk: whoever restarts has no masks to use again, and is left out of the sum.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, islice
from typing import Literal

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedllm.errors import FedllmError, PayloadError, RunPaused
from fedllm.privacy.shamir import SHARE_BYTES, join, split
from fedllm.privacy.words import Words, apply

LEAST_PARTIES = 3
_KEY_BYTES = 32
# Of Curve25519 (RFC 7748).
_FIELD = 2**255 - 19
# Each share is used for one message only, under a key of its own.
_NONCE = bytes(12)
# Ways to choose t shares that are tried when a wrong one is among them.
_MOST_TRIES = 2000

Stage = Literal["new", "keys", "shares", "ready", "masked", "agreed", "over"]


@dataclass(frozen=True)
class Keys:
    """What a party shows at the start of a sum: two public keys, the SHA-256 of its seed, and its signature of them."""

    mask_key: str
    seal_key: str
    seed_digest: str
    signature: str = ""

    def text(self, context: bytes, name: str) -> bytes:
        """Return what is signed.

        Args:
            context: The sum.
            name: The party.
        """
        return _text("keys", context, name, self.mask_key, self.seal_key, self.seed_digest)

    @property
    def can_agree(self) -> bool:
        """Whether a secret can be agreed with both keys.

        With a point of low order, such as zero, the exchange fails whatever the other key is. A second way to write
        the same point would pass for another key.
        """
        return all(_can_agree(key) for key in (self.mask_key, self.seal_key))


@dataclass(frozen=True)
class Opening:
    """A party's shares: of the seeds of those whose vectors are in the sum, and of the mask keys of those missing."""

    seeds: dict[str, str]
    keys: dict[str, str]


@dataclass(frozen=True)
class Signatures:
    """How a party signs, and how it verifies others: `verify(name, text, signature)` raises."""

    sign: Callable[[bytes], bytes]
    verify: Callable[[str, bytes, bytes], None]


def least_of(parties: int, *, threshold: int | None, fewest: int) -> int:
    """Return how many of so many parties must stay, so that a sum of them can be opened.

    Two thirds and one more bear a server that lies to parties together with up to a third of them; more than half,
    the least that is allowed, bear such a server alone (section 6.3 of the paper: 2t > n + number of colluders).

    Args:
        parties: How many begin.
        threshold: The job's own number, or None.
        fewest: No sum has fewer; 3 at least, since of two each knows the other's part from the sum.
    """
    return max(threshold or 2 * parties // 3 + 1, parties // 2 + 1, fewest, LEAST_PARTIES)


def _text(*parts: object) -> bytes:
    words = [part.hex() if isinstance(part, bytes) else part for part in parts]
    return json.dumps(words, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def _derived(secret: bytes, *info: object) -> bytes:
    return HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=_text("fedllm sum", *info)).derive(secret)


def _agreed(own: X25519PrivateKey, other: str) -> bytes:
    return own.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(other)))


def _can_agree(key: str) -> bool:
    try:
        _agreed(X25519PrivateKey.generate(), key)
    except ValueError:
        return False
    return int.from_bytes(bytes.fromhex(key), "little") < _FIELD


def _public(key: X25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def _pair(own: X25519PrivateKey, other: str, context: bytes) -> bytes:
    return _derived(_agreed(own, other), "pair", context)


def _self(seed: bytes, context: bytes) -> bytes:
    return _derived(seed, "self", context)


def _seed_digest(seed: bytes) -> str:
    return hashlib.sha256(b"fedllm seed" + seed).hexdigest()


def agreement(context: bytes, keys: Mapping[str, Keys], asked: str, survivors: Sequence[str]) -> bytes:
    """Return what parties sign before a sum is opened: who takes part, what they were asked, and who is in it.

    Args:
        context: The sum.
        keys: What the parties showed.
        asked: SHA-256 of what they were asked.
        survivors: Whose vectors are in the sum.
    """
    shown = {name: asdict(keys[name]) for name in sorted(keys)}
    return _text("agreement", context, shown, asked, sorted(survivors))


def _refused(what: str, name: str) -> PayloadError:
    return PayloadError(
        "SUM_REFUSED", what, where=name, fix="nothing was opened; `fedllm resume RUN` begins the sum anew"
    )


@dataclass
class Member:
    """A party's half of one sum. Each step is taken once, in this order: keys, seal, take, mask, agree, open.

    Args:
        name: The party.
        context: The sum: the same bytes at all who take part in it.
        known: The parties of the job.
        least: Number of parties -> how many must stay; see `least_of`.
        signatures: The party's own.
    """

    name: str
    context: bytes
    known: Sequence[str]
    least: Callable[[int], int]
    signatures: Signatures = field(repr=False)
    _stage: Stage = "new"
    _mask_key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate, repr=False)
    _seal_key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate, repr=False)
    _seed: bytes = field(default_factory=lambda: secrets.token_bytes(_KEY_BYTES), repr=False)
    _keys: dict[str, Keys] = field(default_factory=dict, repr=False)
    _shares: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False)
    _paired: list[str] = field(default_factory=list, repr=False)
    _agreed: tuple[bytes, list[str]] = field(default=(b"", []), repr=False)

    @property
    def is_ready(self) -> bool:
        """Whether a vector can be masked now."""
        return self._stage == "ready"

    def keys(self) -> Keys:
        """Return what the party shows of itself."""
        self._go("new", "keys")
        own = Keys(_public(self._mask_key), _public(self._seal_key), _seed_digest(self._seed))
        signature = self.signatures.sign(own.text(self.context, self.name))
        self._keys[self.name] = Keys(**asdict(own) | {"signature": signature.hex()})
        return self._keys[self.name]

    def seal(self, shown: Mapping[str, Keys]) -> dict[str, str]:
        """Return the party's shares for each other party, sealed so that it alone can read them.

        Args:
            shown: What all parties showed, this one too.

        Raises:
            PayloadError: `SUM_REFUSED`: too few parties, an unknown one, or keys that are not theirs.
        """
        self._go("keys", "shares")
        least = self.least(len(shown))
        if len(shown) < least:
            raise _refused(f"a sum of {len(shown)} parties, where {least} are the least", self.name)
        if shown.get(self.name) != self._keys[self.name]:
            raise _refused("the list of parties does not show this party's keys", self.name)
        for name, keys in shown.items():
            self._check(name, keys)
        if len({key for keys in shown.values() for key in (keys.mask_key, keys.seal_key)}) < 2 * len(shown):
            raise _refused("two parties show the same key", self.name)
        self._keys = dict(shown)
        order = sorted(shown)
        parts = [split(secret, places=len(order), threshold=least) for secret in (self._secret(), self._seed)]
        shares = {name: (parts[0][place].hex(), parts[1][place].hex()) for place, name in enumerate(order)}
        self._shares[self.name] = shares.pop(self.name)
        return {
            name: self._box(self.name, name, name).encrypt(_NONCE, _text(*pair), None).hex()
            for name, pair in shares.items()
        }

    def _secret(self) -> bytes:
        return self._mask_key.private_bytes_raw()

    def _check(self, name: str, keys: Keys) -> None:
        if name not in self.known:
            raise _refused(f"{name[:64]!r} is no party of the job", self.name)
        try:
            self.signatures.verify(name, keys.text(self.context, name), bytes.fromhex(keys.signature))
        except (FedllmError, ValueError):
            raise _refused(f"the keys of {name} are not signed by it", self.name) from None
        if not keys.can_agree:
            raise _refused(f"{name} shows a key with which no secret can be agreed", self.name)

    def _box(self, sender: str, recipient: str, other: str) -> ChaCha20Poly1305:
        secret = _agreed(self._seal_key, self._keys[other].seal_key)
        return ChaCha20Poly1305(_derived(secret, "seal", self.context, sender, recipient))

    def take(self, sealed: Mapping[str, str]) -> None:
        """Take the shares that others sealed for this party. With whose shares there are, a vector is masked.

        Args:
            sealed: Sender -> its sealed shares.

        Raises:
            PayloadError: `SUM_REFUSED`: too few.
        """
        self._go("shares", "ready")
        senders = sorted(set(sealed) & set(self._keys) - {self.name})
        if len(senders) + 1 < self.least(len(self._keys)):
            raise _refused(f"shares of {len(senders) + 1} of {len(self._keys)} parties are too few", self.name)
        self._paired = senders
        for name in senders:
            # A share that cannot be read is missing when the sum is opened, if it is needed then.
            if (pair := self._opened(name, sealed[name])) is not None:
                self._shares[name] = pair

    def _opened(self, name: str, sealed: str) -> tuple[str, str] | None:
        try:
            found = json.loads(self._box(name, self.name, name).decrypt(_NONCE, bytes.fromhex(sealed), None))
            first, second = (bytes.fromhex(share).hex() for share in found)
        except (InvalidTag, ValueError, TypeError):
            return None
        return (first, second) if len(first) == len(second) == 2 * SHARE_BYTES else None

    def mask(self, words: Words) -> None:
        """Mask a vector in place. It may leave then.

        Args:
            words: The party's summand, weighted.
        """
        self._go("ready", "masked")
        pairs = {_pair(self._mask_key, self._keys[name].mask_key, self.context): name for name in self._paired}
        # Of two parties one adds the mask that they share, and the other takes it off.
        signs = {key: 1 if name > self.name else -1 for key, name in pairs.items()}
        apply(words, {_self(self._seed, self.context): 1} | signs)

    def agree(self, survivors: Sequence[str], asked: str) -> bytes:
        """Return the party's signature of who is in the sum, and of what was asked of it.

        Args:
            survivors: Whose masked vectors arrived.
            asked: SHA-256 of what this party was asked.

        Raises:
            PayloadError: `SUM_REFUSED`: too few, this party not among them, or one who shared nothing.
        """
        self._go("masked", "agreed")
        names = set(survivors)
        if len(names) < len(survivors) or self.name not in names or not names <= {*self._paired, self.name}:
            raise _refused("the list of those in the sum does not fit what this party saw of it", self.name)
        if len(names) < self.least(len(self._keys)):
            raise _refused(f"{len(names)} of {len(self._keys)} parties are too few to open a sum", self.name)
        self._agreed = agreement(self.context, self._keys, asked, survivors), sorted(names)
        return self.signatures.sign(self._agreed[0])

    def open(self, signed: Mapping[str, bytes]) -> Opening:
        """Return the shares with which the sum can be opened, once, and forget all.

        Args:
            signed: Party -> its signature of the agreement.

        Raises:
            PayloadError: `SUM_REFUSED`: fewer parties than must stay signed what this party signed.
        """
        self._go("agreed", "over")
        text, survivors = self._agreed
        count = sum(self._is_signed(name, text, signed[name]) for name in survivors if name in signed)
        if count < self.least(len(self._keys)):
            raise _refused(f"{count} of {len(survivors)} parties were asked the same and see the same sum", self.name)
        missing = set(self._paired) - set(survivors)
        opening = Opening(
            seeds={name: self._shares[name][1] for name in survivors if name in self._shares},
            keys={name: self._shares[name][0] for name in sorted(missing) if name in self._shares},
        )
        self._shares, self._seed = {}, b""
        return opening

    def _is_signed(self, name: str, text: bytes, signature: bytes) -> bool:
        try:
            self.signatures.verify(name, text, signature)
        except FedllmError:
            return False
        return True

    def _go(self, before: Stage, after: Stage) -> None:
        if self._stage != before:
            raise _refused(f"a step of the sum out of its order, after {self._stage!r}", self.name)
        self._stage = after


@dataclass
class Combiner:
    """The server's half of one sum: it relays, adds up what is masked, and opens the sum with the parties' shares.

    Args:
        context: The sum.
        least: Number of parties -> how many must stay.
    """

    context: bytes
    least: Callable[[int], int]
    keys: dict[str, Keys] = field(default_factory=dict)
    sealed: dict[str, dict[str, str]] = field(default_factory=dict)
    survivors: list[str] = field(default_factory=list)
    _words: Words = field(default_factory=dict, repr=False)

    def need(self, names: Sequence[str], what: str) -> None:
        """Return if enough parties are left to open the sum.

        Args:
            names: Those who are left.
            what: What they did, for the error.

        Raises:
            RunPaused: `SUM_ABORTED`. What was added up is forgotten; it was masked.
        """
        least = self.least(len(self.keys))
        if len(names) >= least:
            return
        self._words = {}
        raise RunPaused(
            "SUM_ABORTED",
            f"{len(names)} of {len(self.keys)} parties {what}, and a secure sum needs {least}; nothing was opened",
            fix="see the logs of the parties that are missing; then `fedllm resume RUN`",
        )

    def addressed_to(self, name: str) -> dict[str, str]:
        """Return the sealed shares for one party.

        Args:
            name: The party.
        """
        return {sender: shares[name] for sender, shares in self.sealed.items() if name in shares}

    def add(self, name: str, words: Words) -> None:
        """Add a masked vector.

        Args:
            name: Whose it is; a party's second one is refused.
            words: The vector; its arrays are the sum's own from now on.

        Raises:
            PayloadError: `SUM_REFUSED`.
        """
        if name in self.survivors or name not in self.sealed:
            raise _refused("a vector that the sum has no place for", name)
        self.survivors.append(name)
        if not self._words:
            self._words = words
            return
        for key, array in self._words.items():
            np.add(array, words[key], out=array)

    def opened(self, openings: Mapping[str, Opening]) -> Words:
        """Return the sum.

        Args:
            openings: The parties' shares.

        Raises:
            RunPaused: `SUM_ABORTED`: too few right shares of a party.
        """
        self.need(list(openings), "sent their shares")
        masks: dict[bytes, int] = {}
        for name in self.survivors:
            seed = self._joined({p: o.seeds[name] for p, o in openings.items() if name in o.seeds}, self._is_seed(name))
            masks[_self(seed, self.context)] = -1
        for name in sorted(set(self.sealed) - set(self.survivors)):
            shares = {p: o.keys[name] for p, o in openings.items() if name in o.keys}
            key = X25519PrivateKey.from_private_bytes(self._joined(shares, self._is_key(name)))
            for other in self.survivors:
                # What the survivor added of the mask that it shares with the one who is missing.
                sign = 1 if name > other else -1
                masks[_pair(key, self.keys[other].mask_key, self.context)] = -sign
        words, self._words = self._words, {}
        apply(words, masks)
        return words

    def _joined(self, shares: Mapping[str, str], is_right: Callable[[bytes], bool]) -> bytes:
        least, order = self.least(len(self.keys)), sorted(self.keys)
        places = {order.index(name) + 1: bytes.fromhex(share) for name, share in shares.items()}
        chosen: Iterator[tuple[int, ...]] = islice(combinations(places, least), _MOST_TRIES)
        for some in chosen:
            secret = join({place: places[place] for place in some})
            if secret is not None and is_right(secret):
                return secret
        self._words = {}
        what = "the shares of a party's secret do not fit together; nothing was opened"
        raise RunPaused("SUM_ABORTED", what, fix="then `fedllm resume RUN`")

    def _is_seed(self, name: str) -> Callable[[bytes], bool]:
        return lambda secret: _seed_digest(secret) == self.keys[name].seed_digest

    def _is_key(self, name: str) -> Callable[[bytes], bool]:
        return lambda secret: _public(X25519PrivateKey.from_private_bytes(secret)) == self.keys[name].mask_key
