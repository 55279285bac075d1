"""Memory for a sum: taken from the system in one piece, and given back tensor by tensor as the means are made."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress

import numpy as np
import torch

_BYTES = 8
# A multiple of every size of page.
_STEP_BYTES = 8 * 2**20


class Accumulators:
    """64-bit integers, all 0 at first, for tensors of given sizes.

    They are kept apart from the process's other memory: between buffers that come and go, their places would not be
    found again in the next round, and the process would grow.

    Args:
        sizes: Name -> number of values.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        count = sum(sizes.values())
        self._memory = mmap.mmap(-1, max(1, count * _BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Fewer and larger pages are several times faster to come by; not every system has them.
            with suppress(OSError):
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._flat = torch.frombuffer(self._memory, dtype=torch.int64, count=count) if count else torch.empty(0)
        self._places: dict[str, tuple[int, int]] = {}
        self._released = start = self._shift = 0
        for name, size in sizes.items():
            self._places[name] = start, start + size
            start += size

    def __getitem__(self, name: str) -> torch.Tensor:
        self._settle()
        start, end = self._places[name]
        return self._flat[start:end]

    @property
    def flat(self) -> np.ndarray:
        """All integers in the order of the sizes, to be added to, whatever they are shifted by."""
        return self._flat.numpy()

    def shift(self, count: int) -> None:
        """Note that to all integers `count` will have been added that does not belong there.

        Args:
            count: It is taken off when they are next looked at, modulo 2**64.
        """
        self._shift += count

    def _settle(self) -> None:
        if self._shift:
            np.subtract(self._flat.numpy(), np.uint64(self._shift % 2**64).astype(np.int64), out=self._flat.numpy())
            self._shift = 0

    def release(self, name: str) -> None:
        """Give back the memory up to the end of a tensor, in large steps; the values there are gone.

        Args:
            name: The tensor; it and all before it are not needed any more.
        """
        end = self._places[name][1] * _BYTES // _STEP_BYTES * _STEP_BYTES
        if end > self._released and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, self._released, end - self._released)
            self._released = end
