"""What a run folder says, read for the report: its files, its metrics by name, and sums over parties and rounds."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedllm.errors import ConfigError
from fedllm.runs.jsonl import Row, read_rows
from fedllm.runs.metrics import run_rows

Values = dict[int, float]

# Several rows of one round are added up for these, and the last one counts for the others.
_ADDED = ("seconds_", "bytes_")


@dataclass(frozen=True)
class RunRecord:
    """The files of a run folder; None or empty where a file is absent or unreadable."""

    path: Path
    result: Row
    comparison: Row
    config: Row
    provenance: Row
    parties: list[Row]
    events: list[Row]
    metrics: Metrics

    def setting(self, key: str) -> Any:
        """Return the effective value of a setting, or None.

        Args:
            key: For instance `federation.num_rounds`.
        """
        values = (row["value"] for row in self.settings() if row.get("key") == key)
        return next(values, None)

    def settings(self) -> list[Row]:
        """Return the effective settings: key, value, origin."""
        return _mappings(self.config.get("values"))

    def comparison_rows(self) -> list[Row]:
        """Return the rows of the comparison table, none if models were not compared."""
        return _mappings(self.comparison.get("rows"))

    def party_names(self) -> list[str]:
        """Return the parties: those of parties.json, then others that have metrics or events."""
        met = [str(row["party"]) for row in self.events if row.get("party")]
        return list(dict.fromkeys([*self.metrics.parties, *met]))


@dataclass
class Metrics:
    """Metric rows by name, split and party: `values(...)[round]`."""

    rounds: list[int] = field(default_factory=list)
    parties: list[str] = field(default_factory=list)
    _values: dict[tuple[str, str | None, str | None], Values] = field(default_factory=lambda: defaultdict(dict))
    _lost: dict[tuple[str, str | None], set[int]] = field(default_factory=lambda: defaultdict(set))

    @classmethod
    def of(cls, rows: Iterable[Row], *, parties_first: Iterable[str] = ()) -> Metrics:
        """Return the metrics of rows; what is not a finite number is left out.

        Args:
            rows: `{round, party, split, name, value}`.
            parties_first: Parties in the order to show them; others follow.
        """
        metrics, rounds, parties = cls(), set[int](), dict.fromkeys(parties_first)
        for row in rows:
            number, party, name = row.get("round"), row.get("party"), row.get("name")
            if not isinstance(number, int) or not isinstance(name, str):
                continue
            rounds.add(number)
            if party is not None:
                parties[str(party)] = None
            metrics._add(number, (name, row.get("split"), party), row.get("value"))
        metrics.rounds, metrics.parties = sorted(rounds), list(parties)
        return metrics

    def _add(self, number: int, key: tuple[str, str | None, str | None], value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._lost[key[:2]].add(number)
            return
        found = self._values[key]
        found[number] = found.get(number, 0.0) + value if key[0].startswith(_ADDED) else float(value)

    def values(self, name: str, *, split: str | None = None, party: str | None = None) -> Values:
        """Return a metric by round; empty if there is none.

        Args:
            name: For instance `loss_nats`.
            split: `train`, `held_out`, `common` or None.
            party: None for the federation's own.
        """
        return self._values.get((name, split, party), {})

    def lost(self, name: str, *, split: str | None = None) -> set[int]:
        """Return the rounds in which some value of a metric was no finite number.

        Args:
            name: The metric.
            split: What it was measured on.
        """
        return self._lost.get((name, split), set())

    def by_party(self, name: str, *, split: str | None = None) -> dict[str, Values]:
        """Return a metric of each party by round, empty for those without it, always in the same order.

        Args:
            name: The metric.
            split: What it was measured on.
        """
        return {party: self.values(name, split=split, party=party) for party in self.parties}

    def summed(self, name: str, *, split: str | None = None) -> Values:
        """Return a metric summed over the parties, by round.

        Args:
            name: The metric.
            split: What it was measured on.
        """
        return added(self.by_party(name, split=split).values())

    def of_federation(self, name: str, *, split: str) -> Values:
        """Return the federation's own values, or the plain mean over the parties where it has none.

        Args:
            name: The metric.
            split: What it was measured on.
        """
        if own := self.values(name, split=split):
            return own
        each = self.by_party(name, split=split).values()
        numbers = sorted({number for values in each for number in values})
        return {n: statistics.fmean(values[n] for values in each if n in values) for n in numbers}


def privacy_text(record: RunRecord) -> str | None:
    """Return what a run spent of its parties' privacy, as a sentence; None where it hid nothing.

    The parties' data are apart, so the run's epsilon is that of the party with the largest one.

    Args:
        record: What the run folder says.
    """
    key = "privacy.differential_privacy"
    unit = record.setting(f"{key}.unit")
    if unit in (None, "none"):
        return None
    each = record.metrics.by_party("epsilon_spent").values()
    spent = max((value for values in each for value in values.values()), default=None)
    versions = record.provenance.get("versions")
    library = versions.get("dp-accounting", "") if isinstance(versions, dict) else ""
    how = f"Poisson samples, {record.setting(f'{key}.accountant')} accountant, dp-accounting {library}".strip()
    epsilon = "not known" if spent is None else f"{spent:.3f}"
    return f"epsilon {epsilon} per {unit} at delta {record.setting(f'{key}.delta'):g} ({how})"


def added(parts: Iterable[Values]) -> Values:
    """Return the sum of several metrics, by round.

    Args:
        parts: Metrics by round.
    """
    total: Values = defaultdict(float)
    for values in parts:
        for number, value in values.items():
            total[number] += value
    return dict(total)


def read_run(run: Path) -> RunRecord:
    """Return what a run folder says. Only `job.yaml` must be there.

    Args:
        run: The run folder.

    Raises:
        ConfigError: `RUN_NOT_FOUND`.
    """
    if not (run / "job.yaml").is_file():
        raise ConfigError(
            "RUN_NOT_FOUND", "no run is in this folder", where=str(run), fix="name a folder that `fedllm run` made"
        )
    parties = _mappings(_json(run / "parties.json"))
    names = [str(row["party"]) for row in parties if row.get("party")]
    return RunRecord(
        path=run,
        result=_mapping(run / "result.json"),
        comparison=_mapping(run / "comparison.json"),
        config=_mapping(run / "config.json"),
        provenance=_mapping(run / "provenance.json"),
        parties=parties,
        events=read_rows(run / "events.jsonl"),
        metrics=Metrics.of(run_rows(run), parties_first=names),
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _mapping(path: Path) -> Row:
    found = _json(path)
    return found if isinstance(found, dict) else {}


def _mappings(value: Any) -> list[Row]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
