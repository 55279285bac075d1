"""`fedllm audit-log`: what is printed of a log, and the exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from verbs import Call

from fedllm.errors import ExitCode
from fedllm.runs.audit_log import AuditLog


@pytest.fixture
def log(tmp_path: Path) -> Path:
    log = AuditLog.open(tmp_path / "audit.jsonl", actor="north")
    log.append("kit_opened", digest="ab" * 32)
    log.append("operation", run_id="cd" * 16, round=3, kind="Train", way="asked", num_bytes=1234)
    log.append("run_finished", run_id="cd" * 16)
    return log.path


@pytest.fixture
def peer(tmp_path: Path, log: Path) -> Path:
    head = json.loads(log.read_text().splitlines()[1])
    other = AuditLog.open(tmp_path / "south.jsonl", actor="south")
    other.append("peer_head", peer="north", peer_n=head["n"], digest=head["hash"])
    return other.path


def test_a_whole_log_is_called_so_with_what_bears_it_out(call: Call, log: Path, peer: Path) -> None:
    code, out, err = call("audit-log", "verify", log)
    assert (code, err) == (0, "")
    assert "whole, 3 lines of north" in out and "--peer" in out
    code, out, _ = call("audit-log", "verify", log, "--peer", peer)
    assert code == 0
    assert "other sites noted entry 1; the 1 after it rest on this file alone" in out


def test_a_broken_log_is_named_with_line_and_kind(call: Call, log: Path, peer: Path) -> None:
    log.write_bytes(log.read_bytes().replace(b'"round":3', b'"round":4'))
    code, out, _ = call("audit-log", "verify", log)
    assert code == ExitCode.STATE_LOST
    assert f"{log}:2: edited: " in out and "broken, 1 problems" in out
    code, out, _ = call("audit-log", "verify", log, "--json")
    envelope = json.loads(out)
    assert (code, envelope["exit_code"], envelope["status"]) == (8, 8, "broken")
    assert [(p["line"], p["kind"]) for p in envelope["data"]["problems"]] == [(2, "edited")]


def test_a_cut_log_is_named_by_the_log_of_another_site(call: Call, log: Path, peer: Path) -> None:
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    assert call("audit-log", "verify", log)[0] == 0
    code, out, _ = call("audit-log", "verify", log, "--peer", peer)
    assert code == ExitCode.STATE_LOST
    assert "truncated" in out and "`south`" in out


def test_many_problems_are_cut_short(call: Call, log: Path) -> None:
    log.write_bytes(b"x\n" * 70)
    code, out, _ = call("audit-log", "verify", log)
    assert (code, len(out.splitlines())) == (8, 51)
    assert "20 not shown" in out


def test_show_prints_what_is_there(call: Call, log: Path) -> None:
    log.write_bytes(log.read_bytes() + b"garbage\n")
    code, out, _ = call("audit-log", "show", log)
    lines = out.splitlines()
    assert code == 0
    assert "operation" in lines[1] and "kind=Train" in lines[1] and "num_bytes=1234" in lines[1]
    assert lines[3] == "line 4: unreadable"
    data = json.loads(call("audit-log", "show", log, "--json")[1])["data"]
    assert [item.get("event") for item in data] == ["kit_opened", "operation", "run_finished", None]


@pytest.mark.parametrize("verb", ["verify", "show"])
def test_an_absent_file_is_an_error(call: Call, tmp_path: Path, verb: str) -> None:
    code, _, err = call("audit-log", verb, tmp_path / "absent")
    assert (code, "FILE_NOT_FOUND" in err) == (ExitCode.USAGE, True)
