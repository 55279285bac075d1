"""The weighted sum of updates: the same bits in every order of arrival, in memory that N does not grow."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fedllm.errors import PayloadError

# Values are rounded to multiples of 2**-30 and summed as 64-bit integers, which do not depend on order.
GRID_BITS = 30
_LIMIT = 2**63


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


def _bound_of(tensors: Mapping[str, torch.Tensor], weight: int, counts: Mapping[str, float], sender: str) -> int:
    """Return how much one party can add to any accumulator at most, in grid steps."""
    if weight < 1:
        raise PayloadError("PAYLOAD_REFUSED", f"weight {weight} is below 1", where=sender)
    largest = [float(tensor.abs().max()) for tensor in tensors.values() if tensor.numel()]
    if not all(map(math.isfinite, [*largest, *counts.values()])):
        raise PayloadError("NONFINITE", "a value to be summed is not a finite number", where=sender)
    if any(abs(count) >= _LIMIT / 2**GRID_BITS for count in counts.values()):
        raise _overflow("a count", sender)
    return weight * int(max(largest, default=0.0) * 2.0**GRID_BITS + 1)


class GridSum:
    """Adds weighted tensors and plain counts. Holds one int64 accumulator whatever the number of parties."""

    def __init__(self) -> None:
        self.weight = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._bound = 0

    def add(
        self, tensors: Mapping[str, torch.Tensor], *, weight: int, counts: Mapping[str, float], sender: str
    ) -> None:
        """Add `weight * tensors`, and `counts` as they are.

        Args:
            tensors: One party's update; the same names and shapes in every call.
            weight: The party's weight, 1 or more.
            counts: Named numbers to be summed, such as loss and tokens.
            sender: The party, for errors.

        Raises:
            PayloadError: `SUM_OVERFLOW` when the sum could leave 64 bits, `NONFINITE`, or `PAYLOAD_REFUSED` for a
                weight below 1; nothing was added then.
        """
        bound = self._bound + _bound_of(tensors, weight, counts, sender)
        if bound >= _LIMIT:
            raise _overflow(f"the update with weight {weight}", sender)
        self._bound, self.weight = bound, self.weight + weight
        for name, tensor in tensors.items():
            term = to_grid(tensor).mul_(weight)
            self._sums[name] = self._sums[name].add_(term) if name in self._sums else term
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + round(value * 2**GRID_BITS)

    def means(self) -> dict[str, torch.Tensor]:
        """Return the weighted means of the tensors, float32; empty when nothing was added."""
        scale = self.weight * 2.0**GRID_BITS
        return {name: (total.to(torch.float64) / scale).to(torch.float32) for name, total in self._sums.items()}

    def counts(self) -> dict[str, float]:
        """Return the sums of the plain counts."""
        return {name: total / 2**GRID_BITS for name, total in self._counts.items()}
