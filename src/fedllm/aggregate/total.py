"""The weighted sum of updates: the same bits in every order of arrival, in memory that N does not grow."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from fedllm.aggregate.accumulators import Accumulators
from fedllm.errors import PayloadError
from fedllm.wire.blob import largest_of, specs_of

# Values are rounded to multiples of 2**-30 and summed as 64-bit integers, which do not depend on order.
GRID_BITS = 30
_LIMIT = 2**63
# Values are added in pieces that stay in the processor's cache.
_PIECE = 2**17
# Below this magnitude a value takes no more than 32 bits on the grid.
_SMALL = 2.0 ** (31 - GRID_BITS) - 2.0**-GRID_BITS


def to_grid(tensor: torch.Tensor) -> torch.Tensor:
    """Return the nearest multiples of 2**-30, as int64 counts, same shape.

    Args:
        tensor: Finite floating-point values.
    """
    return (tensor.detach().to("cpu", torch.float64) * 2.0**GRID_BITS).round().to(torch.int64)


def _overflow(what: str, sender: str) -> PayloadError:
    return PayloadError(
        "SUM_OVERFLOW",
        f"{what} does not fit an exact 64-bit sum",
        where=sender,
        fix="lower learning_rate or local_steps; an update this large means that training diverged",
    )


def _bound_of(largest: float, weight: int, counts: Mapping[str, float], sender: str) -> int:
    """Return how much one party can add to any accumulator at most, in grid steps."""
    if weight < 1:
        raise PayloadError("PAYLOAD_REFUSED", f"weight {weight} is below 1", where=sender)
    if not all(map(math.isfinite, [largest, *counts.values()])):
        raise PayloadError("NONFINITE", "a value to be summed is not a finite number", where=sender)
    if any(abs(count) >= _LIMIT / 2**GRID_BITS for count in counts.values()):
        raise _overflow("a count", sender)
    return weight * int(largest * 2.0**GRID_BITS + 1)


class _Pieces:
    """Buffers for a piece of a tensor, made once: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._floats = {dtype: torch.empty(_PIECE, dtype=dtype) for dtype in (torch.float32, torch.float64)}
        self._counts = {dtype: torch.empty(_PIECE, dtype=dtype) for dtype in (torch.int32, torch.int64)}

    def add(self, total: torch.Tensor, tensor: torch.Tensor, weight: int, *, largest: float) -> None:
        """Add `weight * to_grid(tensor)` to a flat tensor of int64; no magnitude is above `largest`."""
        # To scale by a power of two and to round are exact in the values' own precision, if it is 32 bits or more.
        narrow = tensor.is_floating_point() and tensor.dtype != torch.float64
        buffer = self._floats[torch.float32 if narrow else torch.float64]
        flat = tensor.detach().to("cpu").reshape(-1)
        for sums, piece in zip(_pieces_of(total), _pieces_of(flat), strict=True):
            floats = buffer[: len(piece)].copy_(piece).mul_(2.0**GRID_BITS).round_()
            counts = self._counts[torch.int64][: len(piece)]
            # By way of 32 bits, where they are enough, is several times faster.
            counts.copy_(self._counts[torch.int32][: len(piece)].copy_(floats) if largest < _SMALL else floats)
            # So is NumPy's addition of 64-bit integers, since torch multiplies by 1 as well.
            if weight != 1:
                np.multiply(counts.numpy(), weight, out=counts.numpy())
            np.add(sums.numpy(), counts.numpy(), out=sums.numpy())

    def mean(self, total: torch.Tensor, scale: float) -> torch.Tensor:
        """Return `total / scale` as float32."""
        mean, buffer = torch.empty(len(total), dtype=torch.float32), self._floats[torch.float64]
        for target, piece in zip(_pieces_of(mean), _pieces_of(total), strict=True):
            target.copy_(buffer[: len(piece)].copy_(piece).div_(scale))
        return mean


def _pieces_of(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(flat, _PIECE) if len(flat) > _PIECE else (flat,)


class GridSum:
    """Adds weighted tensors and plain counts. Holds one int64 accumulator whatever the number of parties."""

    def __init__(self) -> None:
        self.weight = 0
        self._sums: Accumulators | None = None
        self._shapes: dict[str, list[int]] = {}
        self._pieces = _Pieces()
        self._counts: dict[str, int] = {}
        self._bound = 0

    def add(
        self, tensors: Mapping[str, torch.Tensor], *, weight: int, counts: Mapping[str, float], sender: str
    ) -> None:
        """Add `weight * tensors`, and `counts` as they are.

        Args:
            tensors: One party's update; the same names and shapes in every call. They are looked at one by one.
            weight: The party's weight, 1 or more.
            counts: Named numbers to be summed, such as loss and tokens.
            sender: The party, for errors.

        Raises:
            PayloadError: `SUM_OVERFLOW` when the sum could leave 64 bits, `NONFINITE`, or `PAYLOAD_REFUSED` for a
                weight below 1; nothing was added then.
        """
        largest = largest_of(tensors)
        bound = self._bound + _bound_of(largest, weight, counts, sender)
        if bound >= _LIMIT:
            raise _overflow(f"the update with weight {weight}", sender)
        self._bound, self.weight = bound, self.weight + weight
        if self._sums is None:
            self._shapes = {name: spec.shape for name, spec in specs_of(tensors).items()}
            self._sums = Accumulators({name: math.prod(shape) for name, shape in self._shapes.items()})
        for name, tensor in tensors.items():
            self._pieces.add(self._sums[name], tensor, weight, largest=largest)
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + round(value * 2**GRID_BITS)

    def means(self) -> dict[str, torch.Tensor]:
        """Return the weighted means of the tensors, float32, and let go of the sums; empty when nothing was added."""
        sums, self._sums = self._sums, None
        means: dict[str, torch.Tensor] = {}
        if sums is not None:
            for name, shape in self._shapes.items():
                means[name] = self._pieces.mean(sums[name], self.weight * 2.0**GRID_BITS).reshape(shape)
                sums.release(name)
        return means

    def counts(self) -> dict[str, float]:
        """Return the sums of the plain counts."""
        return {name: total / 2**GRID_BITS for name, total in self._counts.items()}
