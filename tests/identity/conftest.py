"""Keys for the tests of identities, made once: making them is what takes time."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from identities import Keys

from fedllm.identity.keys import MIN_KEY_BITS, new_key


@pytest.fixture(scope="session")
def keys() -> Keys:
    """Return a function that gives each name a key of its own, the same one in all tests."""
    made: dict[str, rsa.RSAPrivateKey] = {}

    def of(name: str) -> rsa.RSAPrivateKey:
        if name not in made:
            made[name] = new_key(bits=MIN_KEY_BITS)
        return made[name]

    return of
