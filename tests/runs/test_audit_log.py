"""The audit log: whatever is done to a line is found, a full disk stops the site, a torn tail is mended and noted."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from fedllm.errors import ConfigError, ExitCode, FedllmError, ResourceError, StateLost
from fedllm.runs import audit_log
from fedllm.runs.audit_log import EMPTY, EVENTS, AuditLog, Entry, Head, parse_line, read_log
from fedllm.runs.audit_verify import Problem, examine_log, verify_log
from fedllm.runs.jsonl import read_rows

LINES = 30
RUN, JOB = "ab" * 16, "cd" * 32
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def write_log(path: Path, *, lines: int = LINES, actor: str = "north", tag: str = "Train") -> list[Head]:
    """Write a log as a site does and return the head after each line."""
    log = AuditLog.open(path, actor=actor)
    heads = [log.append("kit_opened", digest=JOB)]
    for number in range(1, lines):
        heads.append(log.append("operation", run_id=RUN, job_digest=JOB, round=number, kind=tag, way="asked"))
    return heads


def note_heads(path: Path, heads: list[Head], *, actor: str = "south", of: str = "north") -> Path:
    """Write the log of another site that noted these heads."""
    log = AuditLog.open(path, actor=actor)
    for head in heads:
        log.append("peer_head", run_id=RUN, peer=of, peer_n=head.n, digest=head.hash)
    return path


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def entries_of(path: Path) -> list[Entry]:
    entries = [entry for _, _, entry in read_log(path)]
    assert None not in entries
    return [entry for entry in entries if entry]


def kinds(problems: list[Problem]) -> list[str]:
    return [problem.kind for problem in problems]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    write_log(tmp_path / "audit.jsonl")
    return tmp_path / "audit.jsonl"


@pytest.fixture
def peer(tmp_path: Path, log: Path) -> Path:
    """South's log, which noted north's head in the middle and at the end of the run."""
    heads = [Head(entry.n, entry.hash) for entry in entries_of(log)]
    return note_heads(tmp_path / "south.jsonl", [heads[14], heads[-1]])


# What is written


def test_a_line_is_the_documented_json(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path / "audit.jsonl", actor="north")
    assert log.head == EMPTY
    head = log.append("operation", run_id=RUN, job_digest=JOB, round=3, kind="Train", way="answered", num_bytes=9)
    (line,) = lines_of(log.path)
    fields = json.loads(line)
    assert list(fields) == [
        "n", "time", "actor", "event", "run_id", "job_digest", "round", "peer", "digest", "code", "kind", "way",
        "num_bytes", "peer_n", "previous", "hash",
    ]  # fmt: skip
    assert (fields["n"], fields["actor"], fields["event"], fields["peer"]) == (0, "north", "operation", None)
    assert head == log.head == Head(0, fields["hash"])
    assert log.path.stat().st_mode & 0o777 == 0o600


def test_the_hash_is_that_of_the_line_without_it(log: Path) -> None:
    import hashlib

    previous = "0" * 64
    for line in lines_of(log):
        body, _, end = line.partition(b',"hash":"')
        assert end == hashlib.sha256(body + b"}").hexdigest().encode() + b'"}\n'
        assert json.loads(line)["previous"] == previous
        previous = json.loads(line)["hash"]


@pytest.mark.parametrize(
    "facts",
    [{"code": "some text of an exception"}, {"peer": "../north"}, {"digest": "abc"}, {"kind": "a b"}, {"round": -1}],
)
def test_free_text_cannot_be_written(tmp_path: Path, facts: Any) -> None:
    log = AuditLog.open(tmp_path / "audit.jsonl", actor="north")
    with pytest.raises(ValueError, match=next(iter(facts))):
        log.append("operation", **facts)
    with pytest.raises(KeyError):
        log.append("party_time")
    assert log.path.read_bytes() == b""


def test_every_event_is_in_the_documentation() -> None:
    text = (ROOT / "docs" / "how-to" / "audit-log.md").read_text(encoding="utf-8")
    found = {line.split("|")[1].strip(" `"): line.split("|")[2].strip() for line in text.splitlines() if "| `" in line}
    assert {event: found.get(event) for event in EVENTS} == EVENTS


def test_a_log_goes_on_where_it_ended(log: Path) -> None:
    head = AuditLog.open(log, actor="north").append("run_finished", run_id=RUN)
    assert head.n == LINES
    assert verify_log(log) == []


# T47: every attack on every line


def test_a_log_as_it_was_written_is_clean(log: Path, peer: Path) -> None:
    assert verify_log(log) == verify_log(log, [peer]) == verify_log(peer) == []
    verdict = examine_log(log, [peer])
    assert (verdict.actor, verdict.lines, verdict.vouched) == ("north", LINES, LINES - 1)


def delete(lines: list[bytes], at: int) -> list[bytes]:
    return lines[:at] + lines[at + 1 :]


def edit(lines: list[bytes], at: int) -> list[bytes]:
    other = lines[at].replace(b'"code":null', b'"code":"QUORUM"')
    assert other != lines[at]
    return [*lines[:at], other, *lines[at + 1 :]]


def edit_a_bit(lines: list[bytes], at: int) -> list[bytes]:
    # Not the end of the line: that is `torn`.
    place = (at * 37) % (len(lines[at]) - 1)
    other = bytearray(lines[at])
    other[place] ^= 1
    return [*lines[:at], bytes(other), *lines[at + 1 :]]


def edit_and_seal(lines: list[bytes], at: int) -> list[bytes]:
    """Change a line and give it a hash that fits, as somebody does who knows the format."""
    entry = parse_line(lines[at].strip())
    assert entry is not None
    other = entry.model_copy(update={"code": "QUORUM"})
    return [*lines[:at], other.model_copy(update={"hash": other.seal()}).line() + b"\n", *lines[at + 1 :]]


def swap_with_next(lines: list[bytes], at: int) -> list[bytes]:
    other = (at + 1) % len(lines)
    result = list(lines)
    result[at], result[other] = result[other], result[at]
    return result


def repeat(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[: at + 1], *lines[at:]]


def insert_foreign(lines: list[bytes], at: int) -> list[bytes]:
    entry = parse_line(lines[at].strip())
    assert entry is not None
    other = entry.model_copy(update={"event": "job_approved"})
    return [*lines[:at], other.model_copy(update={"hash": other.seal()}).line() + b"\n", *lines[at:]]


def spaces(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], json.dumps(json.loads(lines[at])).encode() + b"\n", *lines[at + 1 :]]


def cut_within(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], lines[at][: len(lines[at]) // 2]]


def cut_after(lines: list[bytes], at: int) -> list[bytes]:
    return lines[:at]


def rewrite_from(lines: list[bytes], at: int) -> list[bytes]:
    """Change a line and write all that follow anew, with hashes that fit."""
    result, previous = lines[:at], None
    for line in lines[at:]:
        entry = parse_line(line.strip())
        assert entry is not None
        changes = {"code": "QUORUM"} if previous is None else {"previous": previous}
        entry = entry.model_copy(update=changes)
        entry = entry.model_copy(update={"hash": entry.seal()})
        previous = entry.hash
        result.append(entry.line() + b"\n")
    return result


Attack = Callable[[list[bytes], int], list[bytes]]
INSIDE: list[Attack] = [edit, edit_a_bit, swap_with_next, repeat, insert_foreign, spaces, cut_within]
# These leave a file that is whole in itself when they are done to its end.
AT_THE_END: list[Attack] = [delete, edit_and_seal]
WHOLE: list[Attack] = [cut_after, rewrite_from]


@pytest.mark.parametrize("attack", INSIDE + AT_THE_END + WHOLE)
def test_every_attack_on_any_line_is_found(log: Path, peer: Path, attack: Attack) -> None:
    lines = lines_of(log)
    missed = []
    for at in range(LINES):
        log.write_bytes(b"".join(attack(lines, at)))
        # Plain reading, which verifies nothing, takes what is there.
        assert all("event" in row for row in read_rows(log)), "the attack would be seen without a verification"
        if not verify_log(log, [peer]):
            missed.append(at)
    assert missed == []


@pytest.mark.parametrize("attack", INSIDE + AT_THE_END)
def test_the_file_alone_shows_every_attack_but_one_on_its_end(log: Path, attack: Attack) -> None:
    lines = lines_of(log)
    missed = []
    for at in range(LINES):
        log.write_bytes(b"".join(attack(lines, at)))
        missed += [] if verify_log(log) else [at]
    assert missed == ([LINES - 1] if attack in AT_THE_END else [])


@pytest.mark.parametrize("attack", WHOLE)
def test_without_the_logs_of_others_a_cut_or_a_rewriting_is_not_seen(log: Path, attack: Attack) -> None:
    lines = lines_of(log)
    for at in range(1, LINES):
        log.write_bytes(b"".join(attack(lines, at)))
        assert verify_log(log) == []


def test_a_rollback_to_an_older_file_is_found_by_what_others_noted(tmp_path: Path, log: Path, peer: Path) -> None:
    log.write_bytes(b"".join(lines_of(log)[:20]))
    AuditLog.open(log, actor="north").append("run_finished", run_id=RUN)
    assert verify_log(log) == []
    (problem,) = verify_log(log, [peer])
    assert (problem.kind, problem.line) == ("truncated", 21)
    assert "`south`" in problem.what and "entry 29" in problem.what


def test_a_log_begun_anew_is_found_by_what_others_noted(tmp_path: Path, log: Path, peer: Path) -> None:
    log.unlink()
    write_log(log, lines=40, tag="Evaluate")
    assert verify_log(log) == []
    assert kinds(verify_log(log, [peer])) == ["rewritten", "rewritten"]


def test_problems_name_line_and_kind(log: Path) -> None:
    lines = lines_of(log)
    expected = {
        edit: [(6, "edited")],
        delete: [(6, "gap")],
        edit_and_seal: [(7, "replaced")],
        spaces: [(6, "unreadable")],
        repeat: [(7, "order")],
        cut_within: [(6, "torn")],
        swap_with_next: [(6, "gap"), (7, "order"), (8, "gap")],
    }
    for attack, found in expected.items():
        log.write_bytes(b"".join(attack(lines, 5)))
        assert [(problem.line, problem.kind) for problem in verify_log(log)] == found


def test_a_line_of_another_site_is_found(tmp_path: Path, log: Path) -> None:
    other = tmp_path / "other.jsonl"
    write_log(other, actor="south")
    log.write_bytes(b"".join(lines_of(log)[:5] + lines_of(other)[5:6]))
    assert "actor" in kinds(verify_log(log))


def test_logs_of_others_that_say_nothing_or_were_changed_are_named(tmp_path: Path, log: Path, peer: Path) -> None:
    silent = tmp_path / "east.jsonl"
    write_log(silent, actor="east")
    assert kinds(verify_log(log, [silent])) == ["unvouched"]
    assert verify_log(log, [silent, peer]) == []
    peer.write_bytes(b"".join(edit(lines_of(peer), 0)))
    (problem,) = verify_log(log, [peer])
    assert (problem.file, problem.line, problem.kind) == (str(peer), 1, "peer_broken")


def test_an_empty_or_absent_file_is_no_clean_log(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").touch()
    assert kinds(verify_log(tmp_path / "audit.jsonl")) == ["empty"]
    with pytest.raises(ConfigError, match="FILE_NOT_FOUND"):
        verify_log(tmp_path / "absent.jsonl")


# A full disk


def half_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next writes of a log put half of a line onto the disk, and then say that it is full."""
    real, calls = os.pwrite, []

    def pwrite(handle: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, bytes(data)[: len(data) // 2], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


def test_a_full_disk_stops_the_site_and_leaves_no_half_line(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit, before = AuditLog.open(log, actor="north"), log.read_bytes()
    with monkeypatch.context() as patch:
        half_a_write(patch)
        with pytest.raises(ResourceError, match="DISK_FULL") as caught:
            audit.append("run_finished", run_id=RUN)
    assert caught.value.exit_code == ExitCode.RESOURCES
    assert log.read_bytes() == before
    # There is space again.
    assert audit.append("run_finished", run_id=RUN).n == LINES
    assert verify_log(log) == []


def test_a_line_that_is_not_durable_is_no_line(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit, before = AuditLog.open(log, actor="north"), log.read_bytes()

    def fsync(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="DISK_FULL"):
        patch.setattr(os, "fsync", fsync)
        audit.append("run_finished", run_id=RUN)
    assert log.read_bytes() == before


def test_a_real_limit_on_the_file_size_fails_closed(log: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from fedllm.errors import ResourceError
from fedllm.runs.audit_log import AuditLog
path = Path(sys.argv[1])
log = AuditLog.open(path, actor="north")
size = path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 700, size + 700))
written = 0
try:
    while True:
        log.append("run_joined")
        written += 1
except ResourceError as error:
    print(written, error.code)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code, log], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["1", "DISK_FULL"]
    assert len(lines_of(log)) == LINES + 1
    assert verify_log(log) == []


def test_a_log_that_cannot_be_opened_fails_closed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="DISK_FULL"):
        AuditLog.open(tmp_path / "file" / "audit.jsonl", actor="north").append("run_joined")


# A torn tail


def test_a_line_that_a_crash_left_torn_is_taken_off_and_noted(log: Path) -> None:
    lines = lines_of(log)
    last, before = lines[-1], b"".join(lines[:-1])
    for length in range(1, len(last)):
        log.write_bytes(before + last[:length])
        assert AuditLog.open(log, actor="north").head.n == LINES - 1
        entry = entries_of(log)[-1]
        assert (entry.n, entry.event, entry.num_bytes) == (LINES - 1, "tail_repaired", length)
        assert verify_log(log) == []


def test_a_line_torn_by_another_process_is_mended_by_the_next_append(log: Path) -> None:
    audit = AuditLog.open(log, actor="north")
    with log.open("ab") as file:
        file.write(b'{"n":30,"time":"2026-')
    assert audit.append("run_joined").n == LINES + 1
    assert [entry.event for entry in entries_of(log)[-2:]] == ["tail_repaired", "run_joined"]


@pytest.mark.parametrize("tail", [b"x", b'{"n":31,"time', b'{"n":29,"time":"', b"\0" * 40, b'{"n":30,"time":"' * 999])
def test_what_no_broken_off_write_leaves_is_not_taken_off(log: Path, tail: bytes) -> None:
    log.write_bytes(log.read_bytes() + tail)
    before = log.read_bytes()
    with pytest.raises(StateLost, match="AUDIT_BROKEN") as caught:
        AuditLog.open(log, actor="north")
    assert caught.value.exit_code == ExitCode.STATE_LOST
    assert "fedllm audit-log verify" in caught.value.fix
    assert log.read_bytes() == before


def test_the_note_of_a_repair_is_not_lost_when_the_disk_is_full(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.write_bytes(log.read_bytes() + b'{"n":30,"time":"2026-01')
    with monkeypatch.context() as patch:
        half_a_write(patch)
        with pytest.raises(ResourceError, match="DISK_FULL"):
            AuditLog.open(log, actor="north")
    AuditLog.open(log, actor="north")
    assert entries_of(log)[-1].event == "tail_repaired"


def test_a_crash_at_any_byte_of_a_repair_keeps_its_note(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(BaseException):
        pass

    whole, real = log.read_bytes(), os.pwrite
    for length in range(0, 400, 7):
        log.write_bytes(whole + b'{"n":30,"time":"2026-01')

        def pwrite(handle: int, data: Any, offset: int, length: int = length) -> int:
            real(handle, bytes(data)[:length], offset)
            raise Crash

        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(os, "pwrite", pwrite)
            AuditLog.open(log, actor="north")
        AuditLog.open(log, actor="north").append("run_joined")
        assert [entry.event for entry in entries_of(log)[LINES:]] == ["tail_repaired", "run_joined"]
        assert verify_log(log) == []


# Opening and sharing


@pytest.mark.parametrize("attack", [edit, edit_and_seal, swap_with_next, spaces, delete])
def test_a_log_whose_last_lines_were_changed_is_not_opened(log: Path, attack: Attack) -> None:
    log.write_bytes(b"".join(attack(lines_of(log), LINES - 3)))
    with pytest.raises(StateLost, match="AUDIT_BROKEN"):
        AuditLog.open(log, actor="north")


def test_the_log_of_another_site_is_not_opened(log: Path) -> None:
    with pytest.raises(StateLost, match="`north`, not of `south`"):
        AuditLog.open(log, actor="south")


@pytest.mark.parametrize("attack", [cut_after, edit_and_seal, rewrite_from, cut_within])
def test_a_change_behind_the_back_of_a_running_process_stops_it(log: Path, attack: Attack) -> None:
    audit = AuditLog.open(log, actor="north")
    log.write_bytes(b"".join(attack(lines_of(log), LINES - 1)))
    before = log.read_bytes()
    with pytest.raises(StateLost, match="AUDIT_BROKEN"):
        audit.append("run_joined")
    assert log.read_bytes() == before


def test_a_log_that_vanishes_stops_the_process(log: Path) -> None:
    audit = AuditLog.open(log, actor="north")
    log.unlink()
    with pytest.raises(StateLost, match="shorter"):
        audit.append("run_joined")


def test_threads_share_one_log_without_a_fork(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path / "audit.jsonl", actor="north")
    threads = [Thread(target=lambda: [log.append("run_joined") for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (log.head.n, verify_log(log.path)) == (99, [])


def test_processes_share_one_log_without_a_fork(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from fedllm.runs.audit_log import AuditLog
log = AuditLog.open(Path(sys.argv[1]), actor="north")
for number in range(20):
    log.append("run_joined", round=number)
"""
    path = tmp_path / "audit.jsonl"
    running = [subprocess.Popen([sys.executable, "-c", code, path]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert (len(lines_of(path)), verify_log(path)) == (60, [])


def test_a_process_that_holds_the_log_for_too_long_is_reported(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(audit_log, "_PATIENCE_S", 0.05)
    audit = AuditLog.open(log, actor="north")
    with log.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match="AUDIT_LOCKED"):
            audit.append("run_joined")
    assert audit.append("run_joined").n == LINES


def test_opening_reads_the_tail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    write_log(path, lines=700)
    lines = lines_of(path)
    path.write_bytes(b"".join(lines[:1] + edit(lines, 1)[1:]))
    read: list[int] = []
    real = os.pread

    def pread(handle: int, size: int, offset: int) -> bytes:
        read.append(size)
        return real(handle, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    log = AuditLog.open(path, actor="north")
    assert path.stat().st_size > 2 * sum(read) > 0
    read.clear()
    log.append("run_joined")
    assert sum(read) < 1000
    # What opening does not look at, a verification finds.
    assert kinds(verify_log(path)) == ["edited"]


def test_errors_are_fedllm_errors_with_a_mend(log: Path) -> None:
    log.write_bytes(b"x\n" + log.read_bytes())
    with pytest.raises(FedllmError) as caught:
        AuditLog.open(log, actor="north")
    assert (caught.value.where, bool(caught.value.fix)) == (str(log), True)


@pytest.mark.slow
def test_a_large_log_opens_at_once_and_verifies_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write_log(path, lines=20_000)
    started = time.process_time()
    AuditLog.open(path, actor="north")
    opened = time.process_time()
    assert verify_log(path) == []
    assert opened - started < (time.process_time() - opened) / 5
