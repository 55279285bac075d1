"""Summands as modular integers and back: the same sums, to the bit, as `fedllm.aggregate.total` makes in the open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedllm.aggregate.total import GRID_BITS, to_grid
from fedllm.errors import PayloadError
from fedllm.privacy.words import Width, Words, width_of
from fedllm.runtime.sum_messages import COUNTS, Masked
from fedllm.scenarios.base import Summand
from fedllm.wire.frame import check_manifest
from fedllm.wire.payload import Manifest, Tensors

_STEPS: int = 2**GRID_BITS


@dataclass(frozen=True)
class Layout:
    """In which integers a job's summands are summed.

    Counts on a grid (`fedllm.wire.codecs`, Grid) are summed as they are, of up to 16 bits in 24 or 32; every other
    value as a multiple of 2**-30, in 64.

    Args:
        parties: The parties of the job.
        max_weight: The largest weight of one.
    """

    parties: int
    max_weight: int

    def widths(self, manifest: Manifest) -> dict[str, Width]:
        """Return the width of each tensor, and of the counts.

        Args:
            manifest: Of the summand.
        """
        found = {
            name: width_of(spec, parties=self.parties, max_weight=self.max_weight) for name, spec in manifest.items()
        }
        return found | {COUNTS: Width(8)}

    def manifest(self, manifest: Manifest, num_counts: int) -> Manifest:
        """Return what travels.

        Args:
            manifest: Of the summand.
            num_counts: How many counts it has.
        """
        sizes = {name: math.prod(spec.shape) for name, spec in manifest.items()} | {COUNTS: 1 + num_counts}
        return {name: width.spec(sizes[name]) for name, width in self.widths(manifest).items()}

    def words(self, summand: Summand, manifest: Manifest, *, party: str) -> Words:
        """Return a summand, weighted, as integers that may be masked.

        Args:
            summand: A party's answer.
            manifest: Of its tensors.
            party: The party, for errors.

        Raises:
            PayloadError: `SUM_OVERFLOW` when a sum of such answers could leave its integers, or `NONFINITE`.
        """
        if summand.weight > self.max_weight:
            raise _overflow(f"the weight {summand.weight} is above max_weight, {self.max_weight}", party)
        words = Words()
        for name, width in self.widths(manifest).items():
            if name != COUNTS:
                words[name] = self._weighted(summand.tensors[name], summand.weight, width, party)
        counts = [summand.weight, *(self._steps(summand.counts[name], party) for name in sorted(summand.counts))]
        return words | {COUNTS: np.array(counts, np.int64).view(np.uint64)}

    def _weighted(self, tensor: torch.Tensor, weight: int, width: Width, party: str) -> np.ndarray:
        flat = tensor.detach().to("cpu").reshape(-1)
        if width.num_bytes < 8:
            return (flat.to(torch.int32) * weight).numpy().view(np.uint32)
        largest = float(flat.double().abs().max()) if flat.numel() else 0.0
        if not math.isfinite(largest):
            raise PayloadError("NONFINITE", "a value to be summed is not a finite number", where=party)
        is_count = not flat.is_floating_point()
        self._check(weight * (largest * (1 if is_count else _STEPS) + 1), party)
        return ((flat.to(torch.int64) if is_count else to_grid(flat)) * weight).numpy().view(np.uint64)

    def _steps(self, value: float, party: str) -> int:
        self._check(abs(value) * _STEPS + 1, party)
        return round(value * _STEPS)

    def _check(self, steps: float, party: str) -> None:
        if not steps * self.parties < 2**63:
            raise _overflow("an update or a count is too large for a sum in 64 bits", party)

    def masked(self, words: Words, manifest: Manifest, names: Sequence[str]) -> Masked:
        """Return words as they travel.

        Args:
            words: Masked.
            manifest: Of the summand.
            names: Of the counts.
        """
        widths = self.widths(manifest)
        return Masked(names=sorted(names), tensors={name: widths[name].packed(words[name]) for name in words})

    def taken(self, payload: Masked, manifest: Manifest, *, party: str) -> Words:
        """Return the words that travelled.

        Args:
            payload: A party's answer.
            manifest: Of the summand.
            party: The party, for errors.

        Raises:
            PayloadError: `PAYLOAD_REFUSED`: another form than asked for.
        """
        check_manifest(payload.tensors, self.manifest(manifest, len(payload.names)), sender=party)
        return {name: width.unpacked(payload.tensors[name]) for name, width in self.widths(manifest).items()}

    def read(self, words: Words, manifest: Manifest, names: Sequence[str]) -> tuple[Tensors, int, dict[str, float]]:
        """Return the sums of the weighted tensors (float64), the weight, and the sums of the counts.

        Args:
            words: An opened sum; its arrays are used up.
            manifest: Of the summands.
            names: Of the counts.
        """
        sums, widths = Tensors(), self.widths(manifest)
        counts = [int(value) for value in widths[COUNTS].signed(words.pop(COUNTS))]
        for name, spec in manifest.items():
            values = widths[name].signed(words.pop(name)).astype(np.float64)
            is_count = not getattr(torch, spec.dtype).is_floating_point
            sums[name] = torch.from_numpy(values if is_count else values / _STEPS).reshape(spec.shape)
        found = {name: value / _STEPS for name, value in zip(sorted(names), counts[1:], strict=True)}
        return sums, counts[0], found


def _overflow(what: str, party: str) -> PayloadError:
    fix = "raise `privacy.secure_aggregation.max_weight`, or lower learning_rate or local_steps"
    return PayloadError("SUM_OVERFLOW", what, where=party, fix=fix)
