"""Shares of a secret: as many as the threshold give it back, one fewer say nothing."""

from __future__ import annotations

import secrets
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.privacy.shamir import PRIME, join, split


@given(places=st.integers(1, 12), data=st.data())
@settings(max_examples=40)
def test_any_so_many_shares_give_the_secret_back(places: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, places))
    secret = data.draw(st.binary(min_size=32, max_size=32))
    shares = dict(enumerate(split(secret, places=places, threshold=threshold), start=1))
    chosen = data.draw(st.permutations(list(shares)))[: data.draw(st.integers(threshold, places))]
    assert join({place: shares[place] for place in chosen}) == secret


def test_one_share_too_few_fits_every_secret() -> None:
    # For each other secret there is a polynomial through the same shares: what is known does not tell them apart.
    shares = split(bytes(31) + b"\7", places=3, threshold=3)
    for secret in (0, 1, 2**255):
        at_zero = {1: int.from_bytes(shares[0], "big"), 2: int.from_bytes(shares[1], "big")}
        # The quadratic through (0, secret), (1, ..), (2, ..), looked at in 3.
        third = (secret - 3 * at_zero[1] + 3 * at_zero[2]) % PRIME
        found = join({1: shares[0], 2: shares[1], 3: third.to_bytes(66, "big")})
        assert found == secret.to_bytes(32, "big")


def test_too_few_shares_give_something_else() -> None:
    secret = secrets.token_bytes(32)
    shares = dict(enumerate(split(secret, places=5, threshold=3), start=1))
    assert all(join({a: shares[a], b: shares[b]}) != secret for a, b in combinations(shares, 2))


def test_the_same_secret_is_shared_otherwise_each_time() -> None:
    assert split(bytes(32), places=3, threshold=2) != split(bytes(32), places=3, threshold=2)


@pytest.mark.parametrize(("size", "places", "threshold"), [(31, 3, 2), (32, 3, 4), (32, 3, 0)])
def test_what_cannot_be_shared_is_refused(size: int, places: int, threshold: int) -> None:
    with pytest.raises(ValueError, match="shares"):
        split(bytes(size), places=places, threshold=threshold)
