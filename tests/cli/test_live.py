"""The live view: what a log and what a terminal shows while a run works or somebody is waited for."""

from __future__ import annotations

import io
import time
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from fedllm.cli import live

ROWS = [
    {"round": 1, "party": None, "split": split, "name": "loss_nats", "value": value}
    for split, value in (("train", 0.44), ("held_out", 0.468), ("common", None))
]


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    return made


def test_a_log_has_a_line_per_round_and_per_new_reason_to_wait(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with live.live_view() as watch:
        watch.on_stage("adverts", 3)
        for why in ("starting: the server", "starting: the server", "waiting: not connected: east", ""):
            watch.on_wait(why, "" if why else "north (trains, step 3/11)")
        watch.on_round(1, ROWS)
    assert capsys.readouterr().err.splitlines() == [
        "adverts: starting: the server",
        "adverts: waiting: not connected: east",
        "adverts: round 1/3, loss train 0.440, held-out 0.468, 0 s",
    ]


def test_a_log_is_never_silent_for_ten_seconds_while_somebody_is_waited_for(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [clock.now]
    with live.live_view() as watch:
        watch.on_stage("adverts", 3)
        for look in range(200):
            clock.now += 0.3
            watch.on_wait("", f"north (trains, step {look}/300)")
            if text := capsys.readouterr().err:
                told.append(clock.now)
                assert text == f"adverts: waiting for north (trains, step {look}/300)\n"
    gaps = [later - before for before, later in pairwise(told)]
    assert 6 <= len(gaps) <= 8 and max(gaps) < 10


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with live.live_view(quiet=True) as watch:
        watch.on_stage("adverts", 3)
        watch.on_wait("waiting", "")
        watch.on_round(1, ROWS)
    assert capsys.readouterr() == ("", "")


def shown(bars: live._Bars, *, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None, soft_wrap=False).print(bars._view())
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


def test_a_terminal_shows_rounds_losses_reasons_and_parties_on_lines_of_their_own() -> None:
    bars = live._Bars()
    assert shown(bars) == ["  loading"]
    bars.on_stage("adverts", 12)
    bars.on_wait("waiting: not connected: south", "")
    first, second = shown(bars)
    assert first.startswith("adverts ") and "round 0/12" in first and second == "  waiting: not connected: south"
    bars.on_wait("", "north (trains, step 3/11)")
    bars.on_round(1, ROWS)
    bars.on_party("asked", "north", 2)
    bars.on_step("north", 3, 11)
    bars.on_state("north", "silent for 8 s, last known: trains, step 3/11")
    bars.on_party("answered", "east", 2)
    rounds, loss, north, east = shown(bars)
    assert "round 1/12" in rounds and loss == "  loss after round 1: train 0.440, held-out 0.468"
    assert north.startswith("  north") and north.endswith("silent for 8 s, last known: trains, step 3/11")
    assert east.startswith("  east") and east.endswith("done")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    bars: Any = live._Bars()
    bars.on_stage("a-name-of-thirty-two-characters-xx", 999)
    bars.on_round(998, ROWS)
    bars.on_step("north", 3, 11)
    assert all(len(line) <= width for line in shown(bars, width=width))
    assert len(shown(bars, width=120)) == 3
