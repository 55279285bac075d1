"""Public keys with which no secret can be agreed: who shows one is named, and nobody else fails of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sums import CONTEXT, Sum, plain_sum, vectors_of

from fedllm.errors import PayloadError
from fedllm.privacy.secure_sum import Keys
from fedllm.seeds import stream

FIVE = ["north", "east", "south", "west", "centre"]
P = 2**255 - 19
# The points of low order of Curve25519, as https://cr.yp.to/ecdh.html lists them, and other spellings of points.
EIGHT = (
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
WEAK = {
    "zero": 0,
    "one": 1,
    "order eight": EIGHT[0],
    "order eight, the other": EIGHT[1],
    "minus one": P - 1,
    "the prime": P,
    "one above the prime": P + 1,
}
SPELLINGS = {"the base point, not reduced": P + 9, "the base point with the high bit": 2**255 + 9}


def changed(sum_: Sum, name: str, **fields: str) -> Keys:
    """Return a party's keys with some in place of others, signed by it."""
    keys = replace(sum_.members[name].keys(), **fields)
    return replace(keys, signature=sum_.signed[name].sign(keys.text(CONTEXT, name)).hex())


@pytest.mark.parametrize("field", ["mask_key", "seal_key"])
@pytest.mark.parametrize("case", [*WEAK, *SPELLINGS])
def test_a_signed_key_that_no_secret_can_be_agreed_with_names_its_party(case: str, field: str) -> None:
    sum_ = Sum(FIVE)
    text = (WEAK | SPELLINGS)[case].to_bytes(32, "little").hex()
    keys = {name: sum_.members[name].keys() for name in FIVE[:4]} | {"centre": changed(sum_, "centre", **{field: text})}
    assert not keys["centre"].can_agree and all(keys[name].can_agree for name in FIVE[:4])
    for name in FIVE[:4]:
        with pytest.raises(PayloadError, match="SUM_REFUSED") as caught:
            sum_.members[name].seal(keys)
        assert "centre shows a key" in caught.value.what


def test_the_base_point_itself_is_a_key_like_others() -> None:
    sum_ = Sum(FIVE)
    assert changed(sum_, "centre", mask_key=(9).to_bytes(32, "little").hex()).can_agree


def test_keys_as_they_are_made_can_always_be_used() -> None:
    draw = stream(1, "keys")
    for _ in range(20):
        sum_, vectors = Sum(FIVE), vectors_of(FIVE, draw)
        sum_.prepare()
        sum_.gather(vectors)
        found = sum_.open()
        assert all((found[key] == array).all() for key, array in plain_sum(vectors, FIVE).items())
