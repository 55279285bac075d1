"""A site's audit log: one JSON line per event, durable, each line holding the hash of the line before.

The chain shows what was changed inside the file. That its end was cut off, or that all of it was written anew, shows
only against the heads that other sites noted of it: see `audit_verify.py`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypedDict, Unpack

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedllm.disk import sync_folder
from fedllm.errors import ConfigError, ResourceError, StateLost

# Event -> when it is written. docs/how-to/audit-log.md has a line for each, held by a test.
EVENTS: dict[str, str] = {
    "kit_opened": "The site's kit was verified at a start; `digest` is that of kit.json.",
    "job_approved": "A person approved a job; `digest` is that of the site's limits.",
    "approval_withdrawn": "A person withdrew an approval.",
    "job_refused": "The site did not take part in a job; `code` says why.",
    "run_joined": "The site began, or began again, to take part in a run.",
    "operation": "A message of the run: its `kind`, `way` asked or answered, `digest` and `num_bytes` of its payload.",
    "round_committed": "A round ended, its state is durable; `digest` is that of the checkpoint, where there is one.",
    "privacy_spent": "A round of training with noise was paid for; `digest` is the last line of the site's ledger.",
    "peer_head": "Another site's newest line: `peer`, its number `peer_n`, and its hash as `digest`.",
    "message_refused": "A message was not used; `code` says why, `peer` from whom it claims to be.",
    "run_finished": "The site's part in a run ended; `code` says why, null where all went well.",
    "tail_repaired": "A line that a crash left half-written was taken off; `digest` and `num_bytes` of that piece.",
}

# Its name in a site's folder.
AUDIT_FILE = "audit.jsonl"
_NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
_SHA256 = r"^[0-9a-f]{64}$"
_TAIL_BYTES = 2**16
_MAX_LINE_BYTES = 2**12
_PATIENCE_S = 30.0


class Facts(TypedDict, total=False):
    """What an event may say beside its name; all of it is null where it is not given."""

    run_id: str | None
    job_digest: str | None
    round: int | None
    peer: str | None
    digest: str | None
    code: str | None
    kind: str | None
    way: Literal["asked", "answered"] | None
    num_bytes: int | None
    peer_n: int | None


class Entry(BaseModel):
    """One line. Its text is the JSON of these fields in this order, without spaces; `hash` covers all before it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    n: int = Field(ge=0)
    time: str = Field(pattern=r"^[0-9T:.+-]{19,40}$")
    actor: str = Field(pattern=_NAME)
    event: str = Field(pattern=r"^[a-z_]{1,40}$")
    run_id: str | None = Field(pattern=r"^[0-9a-f]{32}$")
    job_digest: str | None = Field(pattern=_SHA256)
    round: int | None = Field(ge=0)
    peer: str | None = Field(pattern=_NAME)
    digest: str | None = Field(pattern=_SHA256)
    code: str | None = Field(pattern=r"^[A-Z0-9_]{1,40}$")
    kind: str | None = Field(pattern=r"^[A-Za-z][A-Za-z0-9]{0,63}$")
    way: Literal["asked", "answered"] | None
    num_bytes: int | None = Field(ge=0)
    peer_n: int | None = Field(ge=0)
    previous: str = Field(pattern=_SHA256)
    hash: str = Field(pattern=_SHA256)

    def line(self) -> bytes:
        """Return the line as it stands in the file, without its end."""
        return _text(self.model_dump())

    def seal(self) -> str:
        """Return the hash that the line should have."""
        return hashlib.sha256(_text(self.model_dump(exclude={"hash"}))).hexdigest()


def _text(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def parse_line(line: bytes) -> Entry | None:
    """Return the entry in a line, or None where the line is not written exactly as an entry is.

    Args:
        line: The line without its end.
    """
    try:
        entry = Entry.model_validate_json(line)
    except ValidationError:
        return None
    return entry if entry.line() == line else None


@dataclass(frozen=True)
class Head:
    """The newest line of a log: its number and its hash."""

    n: int
    hash: str


EMPTY = Head(-1, "0" * 64)


class AuditLog:
    """A log open for appending. Several processes and threads may append to one file, one line at a time.

    Args:
        path: The file. `AuditLog.open` also looks at what is in it.
        actor: The site whose log it is.
    """

    def __init__(self, path: Path, *, actor: str) -> None:
        self.path, self.actor = path, actor
        self._head = EMPTY
        # Where the head's line begins and ends; what came after it is read before each append.
        self._start = self._end = 0

    @classmethod
    def open(cls, path: Path, *, actor: str) -> AuditLog:
        """Return a log, its last lines checked and a half-written last line taken off. The first append makes it.

        Args:
            path: The file.
            actor: The site whose log it is.

        Raises:
            StateLost: `AUDIT_BROKEN`.
            ResourceError: `DISK_FULL` or `AUDIT_LOCKED`.
        """
        log = cls(path, actor=actor)
        _ = log.head
        return log

    @property
    def head(self) -> Head:
        """The newest line, whichever process wrote it; number -1 where there is none."""
        if not self._end and not self.path.exists():
            return EMPTY
        with self._locked() as handle:
            self._catch_up(handle)
            return self._head

    def append(self, event: str, **facts: Unpack[Facts]) -> Head:
        """Write a line durably and return it as the log's new head. Where this raises, the caller must stop.

        Args:
            event: A key of `EVENTS`.
            facts: What it says; never text that could quote data.

        Raises:
            StateLost: `AUDIT_BROKEN`, the file is not as it was left.
            ResourceError: `DISK_FULL`, and nothing was written; or `AUDIT_LOCKED`.
        """
        with self._locked() as handle:
            self._catch_up(handle)
            self._put(handle, event, facts)
            return self._head

    @contextmanager
    def _locked(self) -> Iterator[int]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                lock_file(handle, self.path, fcntl.LOCK_EX)
                yield handle
            finally:
                os.close(handle)
        except OSError as error:
            raise ResourceError(
                "DISK_FULL",
                f"cannot write the audit log: {error.strerror}",
                where=str(self.path),
                fix="free some space, then start again; what cannot be noted is not done",
            ) from None

    def _catch_up(self, handle: int) -> None:
        """Check what is new at the end of the file, and take off a line that a crash left half-written."""
        size = os.fstat(handle).st_size
        if not size:
            sync_folder(self.path.parent)
        if size < self._end:
            raise self._broken("the file is shorter than this process left it")
        is_known = self._end > 0
        start = self._start if is_known else _line_start(handle, size)
        *lines, torn = os.pread(handle, size - start, start).split(b"\n")
        if start and not lines:
            raise self._broken("its last line is longer than any entry")
        head = None if start else EMPTY
        for index, line in enumerate(lines):
            entry = self._checked(line, head)
            head = Head(entry.n, entry.hash)
            if is_known and not index and head != self._head:
                raise self._broken("the last line is not the one that this process left")
            self._head, self._start, self._end = head, start, start + len(line) + 1
            start = self._end
        if torn:
            self._mend(handle, torn)

    def _checked(self, line: bytes, before: Head | None) -> Entry:
        entry = parse_line(line)
        if entry is None or entry.seal() != entry.hash:
            raise self._broken("one of its last lines was changed")
        if before is not None and (entry.n, entry.previous) != (before.n + 1, before.hash):
            raise self._broken(f"entry {entry.n} does not follow on the line before it")
        if entry.actor != self.actor:
            raise self._broken(f"it is the log of `{entry.actor}`, not of `{self.actor}`")
        return entry

    def _mend(self, handle: int, torn: bytes) -> None:
        begun = f'{{"n":{self._head.n + 1},"time":"'.encode()
        if len(torn) > _MAX_LINE_BYTES or not (torn.startswith(begun) or begun.startswith(torn)):
            raise self._broken("after its last line stands something that no broken-off write leaves")
        # One byte stays until the note of the repair is whole, so that no crash can lose it.
        os.ftruncate(handle, self._end + 1)
        facts = Facts(digest=hashlib.sha256(torn).hexdigest(), num_bytes=len(torn))
        self._put(handle, "tail_repaired", facts, keep=1)

    def _put(self, handle: int, event: str, facts: Facts, *, keep: int = 0) -> None:
        line = self._sealed(event, facts)
        try:
            _write(handle, line.line() + b"\n", self._end)
            os.fsync(handle)
        except OSError:
            with suppress(OSError):
                os.ftruncate(handle, self._end + keep)
            raise
        self._start, self._end = self._end, self._end + len(line.line()) + 1
        self._head = Head(line.n, line.hash)

    def _sealed(self, event: str, facts: Facts) -> Entry:
        if event not in EVENTS:
            raise KeyError(f"{event} is not in audit_log.EVENTS")
        fields: dict[str, object] = dict.fromkeys(Facts.__annotations__)
        fields |= facts | {"n": self._head.n + 1, "time": _now(), "actor": self.actor, "event": event}
        draft = Entry.model_validate(fields | {"previous": self._head.hash, "hash": EMPTY.hash})
        return draft.model_copy(update={"hash": draft.seal()})

    def _broken(self, what: str) -> StateLost:
        fix = f"keep the file as it is and look at it: `fedllm audit-log verify {self.path}`; nothing is added to it"
        return StateLost("AUDIT_BROKEN", what, where=str(self.path), fix=fix)


def lock_file(handle: int, path: Path, kind: int) -> None:
    """Lock an open log, waiting for another process to finish its line.

    Args:
        handle: The open file.
        path: Its name, for the error.
        kind: `fcntl.LOCK_EX` or `fcntl.LOCK_SH`.

    Raises:
        ResourceError: `AUDIT_LOCKED`.
    """
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                what = f"another process has held the audit log for {_PATIENCE_S:.0f} s"
                fix = f"`fuser {path}` names it; end it, then start again"
                raise ResourceError("AUDIT_LOCKED", what, where=str(path), fix=fix) from None
            time.sleep(0.005)


def _line_start(handle: int, size: int) -> int:
    """Return where a line begins that is at most 64 KiB before the end."""
    start = max(0, size - _TAIL_BYTES)
    return start and start + os.pread(handle, _TAIL_BYTES, start).find(b"\n") + 1


def _now() -> str:
    # Not from `runs/folder.py`, which loads torch: a supervisor and the command line do without.
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _write(handle: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def read_log(path: Path) -> Iterator[tuple[int, bytes, Entry | None]]:
    """Yield (line number from 1, raw line, entry or None) of a log as it stands. Nothing is verified.

    Args:
        path: The file.

    Raises:
        ConfigError: `FILE_NOT_FOUND`.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        fix = "name an audit log, such as site-NAME/audit.jsonl"
        raise ConfigError("FILE_NOT_FOUND", f"cannot read: {error.strerror}", where=str(path), fix=fix) from None
    with file:
        # A line that is being written this moment is not half-read.
        lock_file(file.fileno(), path, fcntl.LOCK_SH)
        left = os.fstat(file.fileno()).st_size
        fcntl.flock(file, fcntl.LOCK_UN)
        for number, raw in enumerate(file, start=1):
            if left <= 0:
                return
            left -= len(raw)
            yield number, raw, parse_line(raw.removesuffix(b"\n"))
