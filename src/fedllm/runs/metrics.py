"""Metric rows: `{round, party, split, name, value}`, one file at the server and one at each party."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedllm.disk import write_atomic
from fedllm.runs.jsonl import Row, append_rows, encode_rows, read_rows


@dataclass(frozen=True)
class RowFile:
    """A `metrics.jsonl` whose rows belong to rounds, so that an abandoned round can be taken out again."""

    path: Path

    def append(self, rows: list[Row]) -> None:
        """Add rows durably.

        Args:
            rows: Metric rows.
        """
        append_rows(self.path, rows)

    def rewind(self, committed_round: int) -> None:
        """Forget the rows of rounds after a committed one.

        Args:
            committed_round: The last round to keep.
        """
        rows = read_rows(self.path)
        kept = [row for row in rows if row["round"] <= committed_round]
        if len(kept) < len(rows):
            write_atomic(self.path, encode_rows(kept))

    def read(self) -> list[Row]:
        """Return all rows."""
        return read_rows(self.path)


def run_rows(run: Path) -> list[Row]:
    """Return the metric rows of a run: the server's, and those of the parties that ran on this machine.

    Args:
        run: The run folder.
    """
    files = [run / "metrics.jsonl", *sorted(run.glob("parties/*/metrics.jsonl"))]
    return [row for path in files for row in read_rows(path)]
