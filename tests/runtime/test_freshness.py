"""Numbers of messages: each passes once, only upwards, also when processes start again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import PayloadError, StateLost
from fedllm.runs.folder import RunFolder
from fedllm.runtime.freshness import EPOCH_BITS, Freshness

JOB = "a" * 64


def number(epoch: int, count: int) -> int:
    return (epoch << EPOCH_BITS) + count


def is_taken(fresh: Freshness, sequence: int) -> bool:
    try:
        fresh.take(sequence, party="north")
    except PayloadError as error:
        assert (error.code, error.where) == ("REPLAYED", "north")
        return False
    return True


numbers = st.builds(number, st.integers(0, 3), st.integers(0, 3))


@given(sent=st.lists(numbers, max_size=20), restarts=st.sets(st.integers(0, 19)))
@settings(max_examples=100)
def test_what_passes_only_goes_up_whatever_is_sent_and_however_often_a_party_restarts(
    sent: list[int], restarts: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("party") / "epoch.json"
    fresh, taken, before = Freshness(path), list[int](), -1
    for place, sequence in enumerate(sent):
        if place in restarts:
            # Nothing of an epoch that was seen before the restart passes after it.
            fresh, before = Freshness(path), max((item >> EPOCH_BITS for item in taken), default=-1)
        expected = sequence > max(taken, default=-1) and sequence >> EPOCH_BITS > before
        assert is_taken(fresh, sequence) == expected
        taken += [sequence] if expected else []
    assert taken == sorted(set(taken))


def test_without_a_file_numbers_start_anew_with_the_process() -> None:
    assert is_taken(Freshness(), 0)
    fresh = Freshness()
    assert [is_taken(fresh, sequence) for sequence in (5, 5, 4, 6)] == [True, False, False, True]


def test_the_file_is_written_once_an_epoch(tmp_path: Path) -> None:
    fresh = Freshness(tmp_path / "epoch.json")
    fresh.take(number(7, 0), party="north")
    (tmp_path / "epoch.json").unlink()
    fresh.take(number(7, 1), party="north")
    assert not (tmp_path / "epoch.json").exists()
    fresh.take(number(8, 0), party="north")
    assert not is_taken(Freshness(tmp_path / "epoch.json"), number(8, 9))
    assert is_taken(Freshness(tmp_path / "epoch.json"), number(9, 0))


def test_a_file_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    for content in ("", "{}", '{"epoch": "x"}', "[1]"):
        (tmp_path / "epoch.json").write_text(content)
        with pytest.raises(StateLost):
            Freshness(tmp_path / "epoch.json")


def test_each_start_of_a_run_has_a_higher_number_also_with_a_clock_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(tmp_path / "run", job_digest=JOB)
    now = int(time.time())
    found = []
    for clock in (now, now, now - 86400, now + 5):
        monkeypatch.setattr(time, "time", lambda clock=clock: float(clock))
        found.append(run.next_epoch())
    assert found == [now, now + 1, now + 2, now + 5]
    # A folder from a backup goes on above what the parties have seen since.
    (tmp_path / "run" / "epoch.json").write_text('{"epoch": 3}')
    assert run.next_epoch() == now + 5
    (tmp_path / "run" / "epoch.json").write_text("{")
    assert run.next_epoch() == now + 5
    run.close()
