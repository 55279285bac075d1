"""The Merkle tree against published roots, and its proofs against every change of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.ownership.merkle import (
    consistency_proof,
    inclusion_proof,
    is_consistent,
    is_included,
    leaf_hash,
    root,
)

# Test vectors of the reference implementation of Certificate Transparency.
INPUTS = ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
ROOTS = {
    0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    4: "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}
LEAVES = [leaf_hash(bytes([number])) for number in range(40)]


@pytest.mark.parametrize("size", ROOTS)
def test_roots_are_those_of_certificate_transparency(size: int) -> None:
    assert root([leaf_hash(bytes.fromhex(text)) for text in INPUTS[:size]]).hex() == ROOTS[size]


@given(st.integers(1, 39), st.data())
def test_each_leaf_is_proved_at_its_place_and_at_no_other(size: int, data: st.DataObject) -> None:
    index, other = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size))
    proof, top = inclusion_proof(LEAVES[:size], index), root(LEAVES[:size])
    assert is_included(LEAVES[index], index, size=size, proof=proof, expected=top)
    assert is_included(LEAVES[index], other, size=size, proof=proof, expected=top) == (other == index)
    assert not is_included(LEAVES[size], index, size=size, proof=proof, expected=top)
    assert not is_included(LEAVES[index], index, size=size, proof=[*proof, top], expected=top)


@given(st.integers(1, 39), st.data())
def test_a_tree_that_only_grew_is_told_from_one_that_was_changed(size: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(1, size))
    proof, new = consistency_proof(LEAVES[:size], old), (size, root(LEAVES[:size]))
    assert is_consistent((old, root(LEAVES[:old])), new, proof)
    assert not is_consistent((old, root(LEAVES[1 : old + 1])), new, proof)
    # The same leaves in another order, or without one.
    swapped = [*LEAVES[1:old], LEAVES[0]]
    assert old == 1 or not is_consistent((old, root(swapped)), new, proof)
    assert not is_consistent((old, root(LEAVES[:old])), (size, root(LEAVES[1 : size + 1])), proof)
