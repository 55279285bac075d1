"""The live view of a run on stderr: bars on a terminal, one line per round elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from fedllm.runtime.run import Watch

Row = dict[str, Any]


def console() -> Console:
    """Return the console for progress and messages to people."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


@contextmanager
def live_view(*, quiet: bool = False) -> Iterator[Watch]:
    """Give the callbacks of a live view, and close the view at the end.

    Args:
        quiet: Show nothing.
    """
    from fedllm.runtime.run import Watch

    if quiet:
        yield Watch()
    elif sys.stderr.isatty():
        with _Bars() as bars:
            yield Watch(bars.on_round, bars.on_party, bars.on_step, bars.on_stage, bars.on_wait)
    else:
        lines = _Lines()
        yield Watch(on_round=lines.on_round, on_stage=lines.on_stage, on_wait=lines.on_wait)


def losses(rows: list[Row]) -> str:
    """Return `train 0.61, held-out 0.52` for a round's rows.

    Args:
        rows: Metric rows of a round.
    """
    found = {row["split"]: row["value"] for row in rows if row["name"] == "loss_nats" and row["party"] is None}
    names = {"train": "train", "held_out": "held-out", "common": "common"}
    return ", ".join(f"{name} {found[split]:.3f}" for split, name in names.items() if found.get(split) is not None)


class _Lines:
    """One line per round, for logs."""

    def __init__(self) -> None:
        self._stage, self._num_rounds, self._started = "", 0, time.monotonic()

    def on_stage(self, stage: str, num_rounds: int) -> None:
        self._stage, self._num_rounds = stage, num_rounds
        if not num_rounds:
            sys.stderr.write(f"{stage}: evaluating\n")

    def on_round(self, number: int, rows: list[Row]) -> None:
        spent = time.monotonic() - self._started
        sys.stderr.write(f"{self._stage}: round {number}/{self._num_rounds}, loss {losses(rows)}, {spent:.0f} s\n")
        sys.stderr.flush()

    def on_wait(self, line: str) -> None:
        sys.stderr.write(f"{self._stage}: {line}\n")
        sys.stderr.flush()


class _Bars:
    """A bar for the rounds of the stage, and one for each party within the round."""

    def __init__(self) -> None:
        self._rounds = Progress(
            TextColumn("[bold]{task.description:<24}"),
            BarColumn(bar_width=24),
            TextColumn("round {task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._parties = Progress(
            TextColumn("  {task.description:<22}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}")
        )
        self._stage: TaskID | None = None
        self._of: dict[str, TaskID] = {}
        self._live = Live(Group(self._rounds, self._parties), console=console(), refresh_per_second=6)

    def __enter__(self) -> _Bars:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._clear_parties()
        self._live.stop()

    def _clear_parties(self) -> None:
        for task in self._of.values():
            self._parties.remove_task(task)
        self._of.clear()

    def on_stage(self, stage: str, num_rounds: int) -> None:
        self._clear_parties()
        if num_rounds:
            self._stage = self._rounds.add_task(stage, total=num_rounds, note="")
        else:
            self._live.console.print(f"{stage}: evaluating")

    def on_round(self, number: int, rows: list[Row]) -> None:
        if self._stage is not None:
            self._rounds.update(self._stage, completed=number, note=f"loss {losses(rows)}")

    def on_wait(self, line: str) -> None:
        if self._stage is not None:
            self._rounds.update(self._stage, note=line)

    def on_party(self, event: str, party: str, round_: int) -> None:
        self._show_party(party)
        done = event == "answered"
        self._parties.update(self._of[party], completed=float(done), total=1, state="done" if done else "asked")

    def _show_party(self, party: str) -> None:
        if party not in self._of:
            self._of[party] = self._parties.add_task(party, total=1, state="")

    def on_step(self, party: str, step: int, num_steps: int) -> None:
        self._show_party(party)
        self._parties.update(self._of[party], completed=step, total=num_steps, state=f"step {step}/{num_steps}")
