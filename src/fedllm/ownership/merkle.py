"""An append-only Merkle tree: its root, and proofs that a leaf is in it and that a newer tree only added to it.

Source: Laurie et al. 2013, RFC 6962, section 2.1: MTH, PATH and PROOF; the checks are those of RFC 9162, sections
2.1.3.2 and 2.1.4.2. Differs: no.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def leaf_hash(data: bytes) -> bytes:
    """Return the hash of a leaf. It begins with another byte than a node's, so that none can pass for the other.

    Args:
        data: The leaf.
    """
    return hashlib.sha256(b"\x00" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _split(size: int) -> int:
    """Return the largest power of two below a size of two or more."""
    return 1 << ((size - 1).bit_length() - 1)


def root(leaves: Sequence[bytes]) -> bytes:
    """Return the root over leaf hashes; of none, the hash of nothing.

    Args:
        leaves: From `leaf_hash`, in the log's order.
    """
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    half = _split(len(leaves))
    return _node(root(leaves[:half]), root(leaves[half:]))


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Return the hashes that lead from a leaf to the root.

    Args:
        leaves: All leaf hashes.
        index: Whose proof, from 0.
    """
    if len(leaves) == 1:
        return []
    half = _split(len(leaves))
    if index < half:
        return [*inclusion_proof(leaves[:half], index), root(leaves[half:])]
    return [*inclusion_proof(leaves[half:], index - half), root(leaves[:half])]


def is_included(leaf: bytes, index: int, *, size: int, proof: Sequence[bytes], expected: bytes) -> bool:
    """Return whether a proof shows that a leaf stands at a place of the tree with this root.

    Args:
        leaf: Its hash.
        index: Its place, from 0.
        size: Leaves of the tree.
        proof: From `inclusion_proof`.
        expected: The root.
    """
    if not 0 <= index < size:
        return False
    place, last, found = index, size - 1, leaf
    for step in proof:
        if last == 0:
            return False
        if place & 1 or place == last:
            found = _node(step, found)
            while place and not place & 1:
                place, last = place >> 1, last >> 1
        else:
            found = _node(found, step)
        place, last = place >> 1, last >> 1
    return last == 0 and found == expected


def consistency_proof(leaves: Sequence[bytes], old_size: int) -> list[bytes]:
    """Return the hashes that show that the tree over `leaves` begins with the tree over its first `old_size` leaves.

    Args:
        leaves: All leaf hashes of the newer tree.
        old_size: Leaves of the older one, 1 or more.
    """
    return _subproof(leaves, old_size, is_whole=True)


def _subproof(leaves: Sequence[bytes], old_size: int, *, is_whole: bool) -> list[bytes]:
    if old_size == len(leaves):
        return [] if is_whole else [root(leaves)]
    half = _split(len(leaves))
    if old_size <= half:
        return [*_subproof(leaves[:half], old_size, is_whole=is_whole), root(leaves[half:])]
    return [*_subproof(leaves[half:], old_size - half, is_whole=False), root(leaves[:half])]


def is_consistent(old: tuple[int, bytes], new: tuple[int, bytes], proof: Sequence[bytes]) -> bool:
    """Return whether a proof shows that a newer tree only added leaves to an older one.

    Args:
        old: Size and root of the older tree; a tree of no leaf begins every tree.
        new: Size and root of the newer one.
        proof: From `consistency_proof`.
    """
    (old_size, old_root), (new_size, new_root) = old, new
    if old_size == 0:
        return not proof
    if old_size >= new_size:
        return old_size == new_size and old_root == new_root and not proof
    steps = [old_root, *proof] if old_size & (old_size - 1) == 0 else list(proof)
    if not steps:
        return False
    place, last = old_size - 1, new_size - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    found_old = found_new = steps[0]
    for step in steps[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            found_old, found_new = _node(step, found_old), _node(step, found_new)
            while place and not place & 1:
                place, last = place >> 1, last >> 1
        else:
            found_new = _node(found_new, step)
        place, last = place >> 1, last >> 1
    return last == 0 and found_old == old_root and found_new == new_root
