"""What is carried in a trial, and what a trial showed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

VALUE_BYTES = 4
# 13.6 M values in 128 tensors: the adapter of a model of some billions of parameters.
TENSORS = 128
VALUES_A_TENSOR = 106_448
CALL_BYTES = 1_000_000


@dataclass(frozen=True)
class Load:
    """So many fp32 values sent to each party and back in each round, without any training between."""

    parties: int
    rounds: int
    tensors: int = TENSORS
    values: int = VALUES_A_TENSOR

    @property
    def num_bytes(self) -> int:
        """Return the bytes that a party gets and sends in a round."""
        return self.tensors * self.values * VALUE_BYTES


@dataclass(frozen=True)
class Trial:
    """Where one run happens.

    Attributes:
        environments: The folder of the engines' environments.
        folder: Empty at first, and removed after the trial with all that the processes wrote.
        timeout_s: Seconds at most for the rounds, or for the calls of one kind.
    """

    environments: Path
    folder: Path
    timeout_s: float


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one run, and the peak memory at the server.

    Attributes:
        rounds_s: Seconds of each round; the first counts as warm-up.
        server_mb: Peak memory of the largest of the server's processes, where it was measured.
        server_side_mb: Peak memory of all of the server's processes together.
    """

    rounds_s: list[float]
    server_mb: float = 0.0
    server_side_mb: float = 0.0


@dataclass
class Row:
    """One line of the table: a way of carrying the load, and its runs.

    Attributes:
        others_cores: Processor cores that everyone else on this machine used meanwhile; the most of all runs.
    """

    name: str
    version: str
    security: str
    runs: list[Timing] = field(default_factory=list)
    others_cores: float = 0.0

    @property
    def seconds(self) -> list[float]:
        """Return the seconds of the rounds that count, of all runs."""
        return [seconds for run in self.runs for seconds in run.rounds_s[1:]]

    @property
    def median_s(self) -> float:
        """Return the median seconds of a round."""
        return statistics.median(self.seconds)

    @property
    def server_mb(self) -> int:
        """Return the peak memory of the server's largest process, over all runs; 0 where it was not measured."""
        return round(max(run.server_mb for run in self.runs))

    @property
    def server_side_mb(self) -> int:
        """Return the peak memory of the server's processes together, over all runs; 0 where it was not measured."""
        return round(max(run.server_side_mb for run in self.runs))
