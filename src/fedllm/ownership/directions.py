"""The directions in which a claim's bits lie: they follow from its key and from what all parties sign before round 0.

A claimant with software of its own could run the whole job in secret first, and choose a key and bits that happen to
fit what comes out. So the key alone does not say where the bits are. When all commitments are in the log, and its root
can change no more, each party signs that root (its share), and the vectors are drawn from

    SHA-256("fedllm own-v2 directions", key seed, root, shares of all parties but the claimant)

Who commits cannot know them: the root holds the commitment itself, and the signatures of the others are not there yet.
An Ed25519 signature follows from key and text, so the same parties with the same commitments come to the same bits.

Source: none; the paper's commitment (Li et al. 2022, arXiv:2109.13236) has no such step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedllm.ownership.claims import BOUND, DRAWN, Claim
from fedllm.ownership.keys import is_signed, sign
from fedllm.ownership.log import SHARE_PURPOSE, OwnershipLog, canonical

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_TAG = b"fedllm own-v2 directions\0"


def share_of(key: Ed25519PrivateKey, root: str) -> str:
    """Return a party's share: its signature of the root over all keys and commitments, hex.

    Args:
        key: The party's signing key.
        root: The root, hex.
    """
    return sign(key, bytes.fromhex(root), purpose=SHARE_PURPOSE)


def is_share(public: str, root: str, share: str) -> bool:
    """Return whether a share is a party's signature of this root.

    Args:
        public: The party's public key, hex.
        root: The root, hex.
        share: The share, hex.
    """
    return is_signed(public, bytes.fromhex(root), share, purpose=SHARE_PURPOSE)


def directed(claim: Claim, log: OwnershipLog | None) -> Claim | None:
    """Return a claim as its marks are drawn and read; None where the log does not say how.

    A log without a share of another party says nothing: its claimant could try keys until one fits.

    Args:
        claim: The claim.
        log: The log of its run, as `check_log` found it whole, or as the party signed it.
    """
    if claim.form != BOUND or log is None or log.keys().keys() != log.shares().keys():
        return None
    others = {party: share for party, share in log.shares().items() if party != claim.party}
    if not others:
        return None
    root = bytes.fromhex(log.first_root())
    seed = hashlib.sha256(_TAG + bytes.fromhex(claim.key_seed) + root + canonical(others)).hexdigest()
    return claim.model_copy(update={"form": DRAWN, "key_seed": seed})


def against_the_form(claim: Claim, log: OwnershipLog) -> Iterator[str]:
    """Yield why a claim's form does not go with a log.

    Args:
        claim: The claim.
        log: The log.
    """
    if claim.form != BOUND:
        yield (
            f"the claim is of the form `{claim.form}` and not of `{BOUND}`: nothing says that its key was not chosen "
            "when the model was known"
        )
    elif claim.bits and not log.keys().keys() - {claim.party}:
        yield (
            f"the log has no party but `{claim.party}`, so the directions of the claim's bits hold no share of another "
            "one: keys could be tried until one fits"
        )
    elif claim.bits and directed(claim, log) is None:
        yield "the log has not the shares of all parties from which the directions of the claim's bits follow"
