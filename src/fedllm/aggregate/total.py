"""The weighted sum of updates: the same bits in every order of arrival, in memory that N does not grow."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from fedllm.aggregate.accumulators import Accumulators
from fedllm.aggregate.compiled import Loops, compiled_loops
from fedllm.errors import PayloadError
from fedllm.wire.stored import largest_of, specs_of, values_of

# Values are rounded to multiples of 2**-30 and summed as 64-bit integers, which do not depend on order.
GRID_BITS = 30
_LIMIT = 2**63
# Values are added in pieces that stay in the processor's cache, or where each is looked at once, in larger ones.
_PIECE = 2**17
_LARGE_PIECE = 2**20
# Of this number and a small value, the sum in float64 is rounded to multiples of 2**-30, halves to even, and its bits,
# seen as an integer, are those of the number plus the count of multiples.
_MAGIC = 1.5 * 2.0 ** (52 - GRID_BITS)
_SHIFT = int(np.float64(_MAGIC).view(np.int64))
_SMALL = 2.0 ** (50 - GRID_BITS)
# Of fewer values the sum is made before numba is loaded.
_WORTH_COMPILING = 2**20
# NumPy lacks the one, numba the other.
_WIDENED = (torch.bfloat16, torch.float16)


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


def _array(values: torch.Tensor) -> np.ndarray:
    return (values.float() if values.dtype in _WIDENED else values).numpy()


def _loops(sums: Accumulators) -> Loops | None:
    return compiled_loops() if len(sums.flat) >= _WORTH_COMPILING else None


class _Pieces:
    """A buffer for a piece of the sum, made once: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._floats = np.empty(_PIECE)
        # The same memory, seen as integers.
        self._counts = self._floats.view(np.int64)

    def add(self, sums: Accumulators, tensors: Mapping[str, torch.Tensor], weight: int, *, largest: float) -> None:
        """Add `weight * to_grid(tensor)` to the sums, which lie in the order of the tensors' names.

        Args:
            sums: What is added to.
            tensors: They may be smaller or larger than a piece.
            weight: The party's weight.
            largest: No magnitude is above it.
        """
        loops = _loops(sums)
        if loops:
            self._add_at_once(loops, sums.flat, tensors, weight)
        else:
            sums.shift(weight * _SHIFT)
            self._add_in_passes(sums.flat, tensors, weight, largest)

    def _add_at_once(self, loops: Loops, totals: np.ndarray, tensors: Mapping[str, torch.Tensor], weight: int) -> None:
        done = 0
        for values in values_of(tensors, _LARGE_PIECE):
            loops.add(totals[done : done + len(values)], _array(values), weight, 2.0**GRID_BITS)
            done += len(values)

    def _add_in_passes(
        self, totals: np.ndarray, tensors: Mapping[str, torch.Tensor], weight: int, largest: float
    ) -> None:
        """Add `weight * (to_grid(tensor) + _SHIFT)` to the integers."""
        done = filled = 0
        for piece in values_of(tensors, _PIECE):
            if filled + len(piece) > _PIECE:
                self._flush(totals[done : done + filled], weight, largest)
                done, filled = done + filled, 0
            self._floats[filled : filled + len(piece)] = _array(piece)
            filled += len(piece)
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

    def mean(self, sums: Accumulators, name: str, scale: float) -> torch.Tensor:
        """Return a tensor's sums, divided by a scale, as float32."""
        totals = sums[name].numpy()
        mean = torch.empty(len(totals), dtype=torch.float32)
        loops, means = _loops(sums), mean.numpy()
        if loops:
            loops.mean(means, totals, scale)
            return mean
        for start in range(0, len(totals), _PIECE):
            floats = self._floats[: len(totals) - start]
            floats[:] = totals[start : start + _PIECE]
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
        self._pieces.add(self._sums, tensors, weight, largest=largest)
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + round(value * 2**GRID_BITS)

    def means(self) -> dict[str, torch.Tensor]:
        """Return the weighted means of the tensors, float32, and let go of the sums; empty when nothing was added."""
        sums, self._sums = self._sums, None
        means: dict[str, torch.Tensor] = {}
        if sums is not None:
            for name, shape in self._shapes.items():
                means[name] = self._pieces.mean(sums, name, self.weight * 2.0**GRID_BITS).reshape(shape)
                sums.release(name)
        return means

    def counts(self) -> dict[str, float]:
        """Return the sums of the plain counts."""
        return {name: total / 2**GRID_BITS for name, total in self._counts.items()}
