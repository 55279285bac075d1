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
from rich.text import Text

if TYPE_CHECKING:
    from fedllm.runtime.run import Watch

Row = dict[str, Any]
_EVERY_S = 8.0


def console() -> Console:
    """Return the console for progress and messages to people."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


@contextmanager
def live_view(*, quiet: bool = False) -> Iterator[Watch]:
    """Give the callbacks of a live view, and close the view at the end.

    Args:
        quiet: Show nothing.
    """
    if not quiet and sys.stderr.isatty():
        with _Bars() as bars:
            # Something is to be seen while torch is loaded.
            from fedllm.runtime.run import Watch

            yield Watch(bars.on_round, bars.on_party, bars.on_step, bars.on_stage, bars.on_wait, bars.on_state)
        return
    from fedllm.runtime.run import Watch

    if quiet:
        yield Watch()
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
    """One line per round, for logs; between them a line for a new reason to wait, and at least every few seconds."""

    def __init__(self) -> None:
        self._stage, self._num_rounds, self._started = "", 0, time.monotonic()
        self._why, self._said = "", time.monotonic()

    def on_stage(self, stage: str, num_rounds: int) -> None:
        self._stage, self._num_rounds = stage, num_rounds
        if not num_rounds:
            sys.stderr.write(f"{stage}: evaluating\n")

    def on_round(self, number: int, rows: list[Row]) -> None:
        spent = time.monotonic() - self._started
        self._say(f"round {number}/{self._num_rounds}, loss {losses(rows)}, {spent:.0f} s")

    def on_wait(self, why: str, who: str) -> None:
        # Who does what changes all the time; a new reason to wait is worth a line at once.
        is_late = time.monotonic() - self._said >= _EVERY_S
        if is_late or (why and why != self._why):
            self._say(why or f"waiting for {who}")
        self._why = why

    def _say(self, line: str) -> None:
        sys.stderr.write(f"{self._stage}: {line}\n")
        sys.stderr.flush()
        self._said = time.monotonic()


class _Bars:
    """A bar for the rounds of the stage, and one for each party within the round."""

    def __init__(self) -> None:
        self._rounds = Progress(
            TextColumn("[bold]{task.description:<20}"),
            BarColumn(bar_width=20),
            TextColumn("round {task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._parties = Progress(
            TextColumn("  {task.description:<18}"), BarColumn(bar_width=20), TextColumn("{task.fields[state]}")
        )
        self._stage: TaskID | None = None
        self._of: dict[str, TaskID] = {}
        self._why, self._loss = "loading", ""
        self._live = Live(get_renderable=self._view, console=console(), refresh_per_second=6)

    def _view(self) -> Group:
        lines = [Text(f"  {self._loss}")] if self._loss else []
        lines += [Text(f"  {self._why}", style="yellow")] if self._why else []
        return Group(self._rounds, *lines, self._parties)

    def __enter__(self) -> _Bars:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._clear_parties()
        self._why = ""
        self._live.stop()

    def _clear_parties(self) -> None:
        for task in self._of.values():
            self._parties.remove_task(task)
        self._of.clear()

    def on_stage(self, stage: str, num_rounds: int) -> None:
        self._clear_parties()
        self._why = ""
        if num_rounds:
            self._stage, self._loss = self._rounds.add_task(stage, total=num_rounds), ""
        else:
            self._live.console.print(f"{stage}: evaluating")

    def on_round(self, number: int, rows: list[Row]) -> None:
        if self._stage is not None:
            self._rounds.update(self._stage, completed=number)
            self._loss = f"loss after round {number}: {losses(rows)}"

    def on_wait(self, why: str, who: str) -> None:
        self._why = why

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

    def on_state(self, party: str, words: str) -> None:
        self._show_party(party)
        self._parties.update(self._of[party], state=words)
