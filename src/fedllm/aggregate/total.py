"""The weighted sum of updates: the same bits in every order of arrival, in memory that N does not grow."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from fedllm.aggregate.accumulators import Accumulators
from fedllm.errors import PayloadError
from fedllm.wire.stored import largest_of, specs_of, values_of

# Values are rounded to multiples of 2**-30 and summed as 64-bit integers, which do not depend on order.
GRID_BITS = 30
_LIMIT = 2**63
# Values are added in pieces that stay in the processor's cache.
_PIECE = 2**17
# Of this number and a small value, the sum in float64 is rounded to multiples of 2**-30, halves to even, and its bits,
# seen as an integer, are those of the number plus the count of multiples.
_MAGIC = 1.5 * 2.0 ** (52 - GRID_BITS)
_SHIFT = int(np.float64(_MAGIC).view(np.int64))
_SMALL = 2.0 ** (50 - GRID_BITS)


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
    """A buffer for a piece of the sum, made once: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._floats = np.empty(_PIECE)
        # The same memory, seen as integers.
        self._counts = self._floats.view(np.int64)

    def add(self, totals: np.ndarray, tensors: Mapping[str, torch.Tensor], weight: int, *, largest: float) -> None:
        """Add `weight * (to_grid(tensor) + _SHIFT)` to integers that lie in the order of the tensors' names.

        Args:
            totals: The integers.
            tensors: They may be smaller or larger than a piece.
            weight: The party's weight.
            largest: No magnitude is above it.
        """
        done = filled = 0
        for piece in values_of(tensors, _PIECE):
            if filled + len(piece) > _PIECE:
                self._flush(totals[done : done + filled], weight, largest)
                done, filled = done + filled, 0
            # NumPy has no bfloat16.
            values = (piece.float() if piece.dtype == torch.bfloat16 else piece).numpy()
            self._floats[filled : filled + len(values)] = values
            filled += len(values)
        self._flush(totals[done : done + filled], weight, largest)

    def _flush(self, totals: np.ndarray, weight: int, largest: float) -> None:
        floats, counts = self._floats[: len(totals)], self._counts[: len(totals)]
        if largest < _SMALL:
            np.add(floats, _MAGIC, out=floats)
        else:
            np.rint(np.multiply(floats, 2.0**GRID_BITS, out=floats), out=floats)
            np.add(floats.astype(np.int64), _SHIFT, out=counts)
        if weight != 1:
            np.multiply(counts, weight, out=counts)
        np.add(totals, counts, out=totals)

    def mean(self, total: torch.Tensor, scale: float) -> torch.Tensor:
        """Return `total / scale` as float32."""
        mean = torch.empty(len(total), dtype=torch.float32)
        sums, means = total.numpy(), mean.numpy()
        for start in range(0, len(sums), _PIECE):
            floats = self._floats[: len(sums) - start]
            floats[:] = sums[start : start + _PIECE]
            means[start : start + _PIECE] = np.divide(floats, scale, out=floats)
        return mean


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
            self._shapes = {name: spec.shape for name, spec in sorted(specs_of(tensors).items())}
            self._sums = Accumulators({name: math.prod(shape) for name, shape in self._shapes.items()})
        self._sums.shift(weight * _SHIFT)
        self._pieces.add(self._sums.flat, tensors, weight, largest=largest)
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
