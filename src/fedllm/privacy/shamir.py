"""Shamir's secret sharing: any t of n shares give the secret back, fewer say nothing about it.

Source: Shamir 1979, "How to share a secret", Communications of the ACM 22.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

# A Mersenne prime above 2**256, so that a secret of 32 bytes is one number of the field.
PRIME = 2**521 - 1
SECRET_BYTES = 32
SHARE_BYTES = 66


def split(secret: bytes, *, places: int, threshold: int) -> list[bytes]:
    """Return the shares of the places 1 to `places`, 66 bytes each.

    Args:
        secret: 32 bytes.
        places: How many shares there are, fewer than 2**32.
        threshold: How many give the secret back, 1 to `places`.

    Raises:
        ValueError: Another number of shares or bytes.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= places:
        raise ValueError(f"{len(secret)} bytes, {threshold} of {places} shares")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_at(coefficients, place).to_bytes(SHARE_BYTES, "big") for place in range(1, places + 1)]


def _at(coefficients: list[int], place: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * place + coefficient) % PRIME
    return value


def join(shares: Mapping[int, bytes]) -> bytes | None:
    """Return the secret that shares belong to, or None where they belong to none of 32 bytes.

    Args:
        shares: Place -> share; as many as the threshold, or more if all are right.
    """
    total = 0
    for place, share in shares.items():
        over, under = 1, 1
        for other in shares:
            if other != place:
                over, under = over * other % PRIME, under * (other - place) % PRIME
        total += int.from_bytes(share, "big") * over * pow(under, -1, PRIME)
    value = total % PRIME
    return value.to_bytes(SECRET_BYTES, "big") if value < 2 ** (8 * SECRET_BYTES) else None
