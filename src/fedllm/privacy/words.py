"""Modular integers: what a secure sum adds up, how wide they are, and how masks are drawn from a stream cipher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedllm.wire.payload import TensorSpec

# Name -> unsigned integers, of 32 bits (of which the lowest 24 may be all that counts) or of 64, one-dimensional.
Words = dict[str, np.ndarray]

_PIECE_BYTES = 2**20
_ZEROS = bytes(_PIECE_BYTES)


@dataclass(frozen=True)
class Width:
    """How wide the integers of a tensor are: 3 or 4 bytes for counts on a grid, 8 for the rest."""

    num_bytes: int

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """In which integers they are computed."""
        return np.uint64 if self.num_bytes == 8 else np.uint32

    def spec(self, size: int) -> TensorSpec:
        """Return in which form so many of them travel.

        Args:
            size: How many.
        """
        if self.num_bytes == 3:
            return TensorSpec(dtype="uint8", shape=[size, 3])
        return TensorSpec(dtype="int32" if self.num_bytes == 4 else "int64", shape=[size])

    def packed(self, words: np.ndarray) -> torch.Tensor:
        """Return words as they travel; of 24 bits the three lowest bytes.

        Args:
            words: From `Words`.
        """
        if self.num_bytes == 3:
            narrow = np.empty((len(words), 3), np.uint8)
            _copy_bytes(words.view(np.uint8).reshape(-1, 4), narrow)
            return torch.from_numpy(narrow)
        return torch.from_numpy(words.view(np.int32 if self.num_bytes == 4 else np.int64))

    def unpacked(self, tensor: torch.Tensor) -> np.ndarray:
        """Return the words that travelled, an array of its own.

        Args:
            tensor: From `packed`.
        """
        found = tensor.numpy()
        if self.num_bytes != 3:
            return np.array(found.view(self.dtype))
        wide = np.zeros((len(found), 4), np.uint8)
        _copy_bytes(found, wide)
        return wide.reshape(-1).view(np.uint32)

    def signed(self, words: np.ndarray) -> np.ndarray:
        """Return the numbers nearest to 0 that words stand for, as int64.

        Args:
            words: A sum.
        """
        if self.num_bytes == 3:
            return ((words << np.uint32(8)).view(np.int32) >> 8).astype(np.int64)
        return words.view(np.int32 if self.num_bytes == 4 else np.int64).astype(np.int64)


def _copy_bytes(source: np.ndarray, target: np.ndarray) -> None:
    # Byte by byte: several times faster than three at a time.
    for place in range(3):
        target[:, place] = source[:, place]


def width_of(spec: TensorSpec, *, parties: int, max_weight: int) -> Width:
    """Return the width in which no sum of such tensors overflows.

    Counts of 8 or 16 bits, each at most 2**(bits - 1), are summed by `parties` with weights up to `max_weight`. Of
    other tensors each party sees to it that its values, in 64 bits, are small enough.

    Args:
        spec: The tensor, before it is weighted.
        parties: The most that take part.
        max_weight: The largest weight.
    """
    bits = {"int8": 8, "int16": 16}.get(spec.dtype)
    for num_bytes in (3, 4):
        if bits is not None and parties * max_weight * 2 ** (bits - 1) < 2 ** (8 * num_bytes - 1):
            return Width(num_bytes)
    return Width(8)


class Mask:
    """Endless words that look random to whoever does not have the key: AES-256 in counter mode.

    Args:
        key: 32 bytes, used for one mask only.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._buffer = bytearray(_PIECE_BYTES)

    def add_to(self, words: np.ndarray, *, sign: int) -> None:
        """Add the next words to an array, or take them off, in place.

        Args:
            words: The array.
            sign: 1 or -1.
        """
        step = _PIECE_BYTES // words.itemsize
        change = np.add if sign > 0 else np.subtract
        for start in range(0, len(words), step):
            piece = words[start : start + step]
            self._cipher.update_into(_ZEROS[: piece.nbytes], self._buffer)
            change(piece, np.frombuffer(self._buffer, words.dtype, len(piece)), out=piece)


def apply(words: Mapping[str, np.ndarray], masks: Mapping[bytes, int]) -> None:
    """Add masks to words, or take them off, in place, in the order of their names.

    Args:
        words: The words.
        masks: Key -> 1 or -1.
    """
    streams = [(Mask(key), sign) for key, sign in masks.items()]
    for name in sorted(words):
        for mask, sign in streams:
            mask.add_to(words[name], sign=sign)
