"""The run folder's files: rows that survive a crash, atomic writes, and one process at a time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.disk import write_atomic
from fedllm.errors import ConfigError, ResourceError
from fedllm.runs.folder import RunFolder, last_commit
from fedllm.runs.jsonl import append_rows, finite, read_rows, write_json
from fedllm.runs.metrics import RowFile, run_rows

ROWS = [{"round": number, "name": "loss_nats", "value": number / 3, "text": "ä\n'\"\u2028"} for number in range(4)]


def test_rows_come_back_in_order_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, ROWS[:1])
    append_rows(path, ROWS[1:])
    assert read_rows(path) == ROWS
    assert len(path.read_bytes().split(b"\n")) == len(ROWS) + 1


def test_an_absent_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "rows.jsonl") == []


def test_a_line_torn_at_any_place_is_left_out_and_then_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, ROWS[:2])
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for cut in range(first, len(data)):
        path.write_bytes(data[:cut])
        # Only the line's end is missing at the last cut: it can be read, but counts as torn when rows are added.
        assert read_rows(path) == (ROWS[:2] if cut == len(data) - 1 else ROWS[:1])
        append_rows(path, ROWS[2:])
        assert read_rows(path) == [ROWS[0], *ROWS[2:]]


def test_a_damaged_line_in_the_middle_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, ROWS)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\x00\xff{\n", b"[1]\n", *lines[1:]]))
    assert read_rows(path) == ROWS


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    values = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}, "e": (2, "x")}
    append_rows(tmp_path / "rows.jsonl", [values])
    write_json(tmp_path / "file.json", values)
    expected = {"a": None, "b": [None, 1.5], "c": {"d": None}, "e": [2, "x"]}
    assert finite(values) == expected
    for name in ("rows.jsonl", "file.json"):
        text = (tmp_path / name).read_text()
        assert json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) == expected


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_file_is_the_old_or_the_new_one_whatever_fails(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, b"old")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(Path, {"write": "open", "replace": "replace"}[call], full)
        with pytest.raises(ResourceError) as caught:
            write_atomic(path, b"new")
    assert (caught.value.code, caught.value.where) == ("DISK_FULL", str(path))
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("file.json", b"old")]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_rewinding_forgets_later_rounds_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RowFile(tmp_path / "metrics.jsonl")
    file.append(ROWS)
    before = file.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda path, target: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            file.rewind(1)
    assert file.path.read_bytes() == before
    file.rewind(1)
    assert file.read() == ROWS[:2]
    file.rewind(-1)
    assert file.read() == []


@given(numbers=st.lists(st.integers(0, 5), max_size=12), keep=st.integers(-1, 6))
@settings(max_examples=50)
def test_rewinding_keeps_the_order_of_what_is_left(
    numbers: list[int], keep: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = RowFile(tmp_path_factory.mktemp("rows") / "metrics.jsonl")
    rows = [{"round": number, "at": index} for index, number in enumerate(numbers)]
    file.append(rows)
    file.rewind(keep)
    assert file.read() == [row for row in rows if row["round"] <= keep]


def test_the_rows_of_a_run_are_those_of_the_server_and_of_its_parties(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", job_digest="a" * 64)
    run.rows().append([{"round": 0, "party": None}])
    for party in ("north", "south"):
        run.party_rows(party).append([{"round": 0, "party": party}])
    run.close()
    assert [row["party"] for row in run_rows(run.path)] == [None, "north", "south"]


def test_the_journal_knows_the_last_committed_round(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", job_digest="a" * 64)
    assert run.last_commit() is None
    steps = [(0, "begin"), (0, "commit"), (1, "begin"), (1, "commit"), (2, "begin")]
    for number, step in steps:
        run.journal(number, step)
    assert last_commit(run.path) == 1
    run.journal(0, "rollback")
    assert last_commit(run.path) == 0
    run.close()


def test_a_run_folder_is_locked_against_other_processes_and_other_runs(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", job_digest="a" * 64)
    program = "import sys, pathlib; from fedllm.runs.folder import RunFolder as R; R.open(pathlib.Path(sys.argv[1]))"
    other = subprocess.run([sys.executable, "-c", program, str(run.path)], capture_output=True, text=True, check=False)
    assert "RUN_EXISTS" in other.stderr
    for again in (lambda: RunFolder.open(run.path), lambda: RunFolder.create(run.path, job_digest="a" * 64)):
        with pytest.raises(ConfigError, match="RUN_EXISTS"):
            again()
    run.close()
    opened = RunFolder.open(run.path)
    assert (opened.run_id, opened.job_digest) == (run.run_id, "a" * 64)
    opened.close()


def test_a_start_that_broke_off_makes_room_for_a_new_one(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path / "run", job_digest="a" * 64)
    (first.path / "job.yaml").write_text("x")
    (first.path / "config.json.tmp").write_text("x")
    first.close()
    second = RunFolder.create(tmp_path / "run", job_digest="b" * 64)
    assert second.run_id != first.run_id
    (second.path / "local.json").write_text("{}")
    second.close()
    with pytest.raises(ConfigError, match="RUN_EXISTS"):
        RunFolder.create(tmp_path / "run", job_digest="b" * 64)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: None,
        lambda path: (path / "run.json").write_text("{"),
        lambda path: (path / "run.json").write_text("[]"),
        lambda path: (path / "run.json").write_text('{"run_id": "x"}'),
    ],
)
def test_a_folder_that_is_no_run_is_named(spoil: Callable[[Path], Any], tmp_path: Path) -> None:
    spoil(tmp_path)
    with pytest.raises(ConfigError) as caught:
        RunFolder.open(tmp_path)
    assert (caught.value.code, caught.value.where) == ("RUN_NOT_FOUND", str(tmp_path))


def test_a_party_s_folder_is_held_until_the_run_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedllm.runs.folder._PATIENCE_S", 0.2)
    first = RunFolder.create(tmp_path / "run", job_digest="a" * 64)
    first.hold_party("north")
    second = RunFolder(first.path, first.run_id, first.job_digest, None)
    with pytest.raises(ConfigError, match="RUN_EXISTS"):
        second.hold_party("north")
    second.hold_party("south")
    first.close()
    second.hold_party("north")
    second.close()
