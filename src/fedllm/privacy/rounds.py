"""What private training is given for one round: who is sampled, how far each may pull, and the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.privacy.noise import NoiseStream


@dataclass(frozen=True)
class PrivateRound:
    """The terms of a round's noisy sums.

    Args:
        units: Of each unit, the indices of its examples; every example is of one unit.
        sampling_rate: Chance of each unit to be in a step, in (0, 1].
        noise_multiplier: Standard deviation of the noise in clip norms.
        clip_norm: Largest L2 norm of a unit's gradient.
        noise: Secret numbers, for the samples as well: who knows who was drawn can do without the noise of the others.
    """

    units: Sequence[Sequence[int]]
    sampling_rate: float
    noise_multiplier: float
    clip_norm: float
    noise: NoiseStream

    @property
    def expected_units(self) -> float:
        """How many units a step draws on average. Sums are divided by it, since the real number is not public."""
        return self.sampling_rate * len(self.units)

    def sample(self, step: int) -> list[int]:
        """Return the units of a step, each drawn by itself; often more or fewer than expected, and sometimes none.

        Args:
            step: Number of the step over the whole run.
        """
        drawn = self.noise.uniforms(len(self.units), "sample", step) < self.sampling_rate
        return [int(unit) for unit in np.flatnonzero(drawn)]

    def normals(self, count: int, *labels: str | int) -> np.ndarray:
        """Return the noise of a sum, float64, shape (count,).

        Args:
            count: Values in the sum.
            labels: Which sum.
        """
        return self.noise.normals(count, "noise", *labels) * (self.noise_multiplier * self.clip_norm)
