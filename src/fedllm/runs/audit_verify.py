"""Audit logs read back: is each line the one that was written, and is none missing?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedllm.runs.audit_log import EMPTY, Entry, read_log

Kind = Literal[
    "empty",
    "torn",
    "unreadable",
    "edited",
    "gap",
    "order",
    "replaced",
    "actor",
    "rewritten",
    "truncated",
    "unvouched",
    "peer_broken",
]


@dataclass(frozen=True)
class Problem:
    """What is wrong with a log. `line` counts from 1; None where it is about the file as a whole."""

    file: str
    line: int | None
    kind: Kind
    what: str


@dataclass(frozen=True)
class Verdict:
    """What a verification found. `vouched` is the last entry that another site's log bears out, or None."""

    actor: str | None
    lines: int
    vouched: int | None
    problems: list[Problem]


@dataclass(frozen=True)
class _Note:
    """A head of the log as another site noted it."""

    n: int
    digest: str
    by: str


@dataclass
class _Walk:
    """One pass along a log."""

    path: Path
    notes: dict[int, list[_Note]] = field(default_factory=dict)
    actor: str | None = None
    lines: int = 0
    n: int = EMPTY.n
    hash: str | None = EMPTY.hash
    vouched: int | None = None
    problems: list[Problem] = field(default_factory=list)

    def entries(self) -> Iterator[Entry]:
        """Yield the entries that are whole, noting what is wrong on the way."""
        for number, raw, entry in read_log(self.path):
            self.lines = number
            if not raw.endswith(b"\n"):
                self._add("torn", "the line has no end: a write broke off here, or the file was cut")
            elif entry is None:
                self._add("unreadable", "not written as an entry is")
                self.n, self.hash = self.n + 1, None
            else:
                self._step(entry)
                yield entry
        if not self.lines:
            self.problems.append(Problem(str(self.path), None, "empty", "the file has no line"))

    def _step(self, entry: Entry) -> None:
        if entry.seal() != entry.hash:
            self._add("edited", "its hash is not that of its text")
        if entry.n > self.n + 1:
            self._add("gap", f"entry {entry.n} where entry {self.n + 1} belongs: lines were taken out or moved")
        elif entry.n <= self.n:
            self._add("order", f"entry {entry.n} where entry {self.n + 1} belongs: a line was moved or put in")
        elif self.hash not in (None, entry.previous):
            self._add("replaced", "it was written after another line than the one before it: that one was replaced")
        self.actor = self.actor or entry.actor
        if entry.actor != self.actor:
            self._add("actor", f"a line of `{entry.actor}` in the log of `{self.actor}`")
        self.n, self.hash = entry.n, entry.hash
        for note in self.notes.get(entry.n, ()):
            if note.digest == entry.hash:
                self.vouched = max(entry.n, self.vouched or 0)
            else:
                self._add("rewritten", f"not the entry {entry.n} that the log of `{note.by}` noted")

    def _add(self, kind: Kind, what: str) -> None:
        self.problems.append(Problem(str(self.path), self.lines, kind, what))


def verify_log(path: Path, peers: Sequence[Path] = ()) -> list[Problem]:
    """Return what is wrong with an audit log; nothing where it is as it was written.

    Within one file, an edit, a deletion, an insertion or a move of lines is found. A file whose end was cut off at
    the end of a line, or that was written anew with fresh hashes, is found only with `peers`.

    Args:
        path: The log.
        peers: Logs of other sites, which noted heads of this one.

    Raises:
        ConfigError: `FILE_NOT_FOUND`.
    """
    return examine_log(path, peers).problems


def examine_log(path: Path, peers: Sequence[Path] = ()) -> Verdict:
    """Return what a verification of an audit log found; see `verify_log`.

    Args:
        path: The log.
        peers: Logs of other sites.

    Raises:
        ConfigError: `FILE_NOT_FOUND`.
    """
    actor = next((entry.actor for _, _, entry in read_log(path) if entry), None)
    notes, problems = _notes_of(actor, peers)
    walk = _Walk(path, notes)
    for _ in walk.entries():
        pass
    problems = walk.problems + _missing_end(walk) + problems
    if peers and not notes:
        what = f"none of the other logs noted a head of `{actor}`, so nothing bears this one out"
        problems.append(Problem(str(path), None, "unvouched", what))
    return Verdict(actor, walk.lines, walk.vouched, problems)


def _notes_of(actor: str | None, peers: Sequence[Path]) -> tuple[dict[int, list[_Note]], list[Problem]]:
    notes, problems = defaultdict[int, list[_Note]](list), list[Problem]()
    for peer in peers:
        walk = _Walk(peer)
        for entry in walk.entries():
            if entry.event == "peer_head" and entry.peer == actor and entry.peer_n is not None and entry.digest:
                notes[entry.peer_n].append(_Note(entry.peer_n, entry.digest, entry.actor))
        problems += [Problem(p.file, p.line, "peer_broken", f"{p.kind}: {p.what}") for p in walk.problems]
    return dict(notes), problems


def _missing_end(walk: _Walk) -> list[Problem]:
    last = max((n for n in walk.notes), default=-1)
    if last <= walk.n:
        return []
    who = " and ".join(sorted({f"`{note.by}`" for note in walk.notes[last]}))
    what = f"the log of {who} noted entry {last}, and the file ends with entry {walk.n}: its end was cut off"
    return [Problem(str(walk.path), walk.lines, "truncated", what)]
