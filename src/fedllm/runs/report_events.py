"""The report's list of events: what went wrong or was mended; rounds that just began and ended are counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

from fedllm.runs.jsonl import Row
from fedllm.runs.report_panels import seconds_text

_WORDS = {
    "run_started": "Run started",
    "round_started": "Round started",
    "party_failed": "Party failed",
    "round_committed": "Round committed",
    "run_paused": "Run paused",
    "run_resumed": "Run resumed",
    "rolled_back": "Rolled back",
    "run_failed": "Run failed",
    "run_finished": "Run finished",
}
_ROUTINE = ("round_started", "round_committed")
_TONES = {"party_failed": "bad", "run_failed": "bad", "run_paused": "fair", "rolled_back": "fair"}
_MAX_ROWS = 400


@dataclass(frozen=True)
class EventRow:
    """An event, in words."""

    time: str
    name: str
    tone: str
    round: str
    party: str | None
    code: str
    detail: str


def event_rows(events: list[Row]) -> list[EventRow]:
    """Return the events worth reading, oldest first; of very many, the first and the last ones.

    Args:
        events: Rows of events.jsonl.
    """
    rows = [
        _row(event, events[place - 1] if place else None)
        for place, event in enumerate(events)
        if event.get("event") not in _ROUTINE
    ]
    if len(rows) <= _MAX_ROWS:
        return rows
    left_out = EventRow("", f"{len(rows) - _MAX_ROWS} events left out", "", "", None, "", "events.jsonl has all")
    return [*rows[: _MAX_ROWS // 2], left_out, *rows[-_MAX_ROWS // 2 :]]


def event_summary(events: list[Row]) -> str:
    """Return a sentence that counts the rounds begun and committed.

    Args:
        events: Rows of events.jsonl.
    """
    counts = Counter(str(event.get("event")) for event in events)
    begun, done = counts["round_started"], counts["round_committed"]
    lost = f" Begun and not committed: {begun - done}." if begun > done else ""
    return f"Rounds begun {begun} times and committed {done} times, round 0 included.{lost}" if begun else ""


def failures_of(events: list[Row], party: str) -> list[tuple[str, int]]:
    """Return (code, how often) of a party's failures, the most frequent first.

    Args:
        events: Rows of events.jsonl.
        party: Its name.
    """
    failed = (event for event in events if event.get("event") == "party_failed" and event.get("party") == party)
    return Counter(str(event.get("code")) for event in failed).most_common()


def clock_text(time: object) -> str:
    """Return an ISO 8601 time as date and time of day in UTC; what is no time is returned as it is.

    Args:
        time: From a file of the run.
    """
    try:
        moment = datetime.fromisoformat(str(time))
    except ValueError:
        return "" if time is None else str(time)
    return (moment.astimezone(UTC) if moment.tzinfo else moment).strftime("%Y-%m-%d %H:%M:%S")


def _row(event: Row, before: Row | None) -> EventRow:
    name, number = str(event.get("event")), event.get("round")
    detail = str(event.get("detail") or "")
    if name == "run_resumed" and before is not None and (gap := _gap(before, event)):
        detail = f"{detail} after {gap} without work".strip()
    return EventRow(
        time=clock_text(event.get("time")),
        name=_WORDS.get(name, name.replace("_", " ")),
        tone=_TONES.get(name, ""),
        round="" if number is None else str(number),
        party=None if event.get("party") is None else str(event["party"]),
        code=str(event.get("code") or ""),
        detail=detail,
    )


def _gap(before: Row, event: Row) -> str:
    try:
        elapsed = datetime.fromisoformat(str(event["time"])) - datetime.fromisoformat(str(before["time"]))
    except (KeyError, TypeError, ValueError):
        return ""
    return seconds_text(max(elapsed.total_seconds(), 0.0))
