"""Crashes on purpose: at the k-th time that a run touches the disk, the process 'dies'."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from tiny import THOROUGH, TinyFederation, row_keys

from fedllm.errors import ConfigError
from fedllm.runs.jsonl import Row, read_rows
from fedllm.runtime import run as run_module
from fedllm.runtime.run import RunResult, resume
from fedllm.runtime.site import open_site, party_tokens


class Crash(BaseException):
    """The end of a process: nothing of ours catches it."""


class Disk:
    """Counts what is made durable, renamed or removed, and crashes at one of these points.

    At a crash while a line is being appended, half of it is left behind.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.crash_at = 0, -1
        self._replace, self._unlink, self._rmtree = Path.replace, Path.unlink, shutil.rmtree
        monkeypatch.setattr(os, "fsync", self._fsync)
        # A process that dies does not write a verdict first.
        monkeypatch.setattr(run_module, "concluding", lambda run: nullcontext())
        monkeypatch.setattr(Path, "replace", lambda path, target: self._at(self._replace, path, target))
        monkeypatch.setattr(Path, "unlink", lambda path, **options: self._at(self._unlink, path, **options))
        monkeypatch.setattr(shutil, "rmtree", lambda path, **options: self._at(self._rmtree, path, **options))

    def _at(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self._tick()
        return call(*args, **options)

    def _tick(self) -> None:
        self.count += 1
        if self.count == self.crash_at:
            raise Crash

    def _fsync(self, handle: int) -> None:
        try:
            self._tick()
        except Crash:
            path = Path(f"/proc/self/fd/{handle}").readlink()
            if path.suffix == ".jsonl":
                os.truncate(path, max(0, path.stat().st_size - 9))
            raise

    @contextmanager
    def crashing_at(self, number: int) -> Iterator[None]:
        """Crash at the n-th point from here, if it is reached.

        Args:
            number: From 1.
        """
        self.count, self.crash_at = 0, number
        try:
            yield
        finally:
            self.crash_at = -1


def some(points: Iterable[int], *, every: int) -> list[int]:
    """Return every so many of the points at which a test crashes; all of them with `make thorough`.

    Args:
        points: All points.
        every: Of how many one is taken.
    """
    return list(points)[:: 1 if THOROUGH else every]


def share_the_base(monkeypatch: pytest.MonkeyPatch, federation: TinyFederation) -> None:
    """Load the base once for all runs of a test, and write a report of one word: both are tested elsewhere.

    Args:
        monkeypatch: For the test.
        federation: Whose job runs.
    """
    site = open_site(federation.job(), federation.parties())
    data = {located.party.name: party_tokens(site, located) for located in federation.parties()}
    monkeypatch.setattr(run_module, "open_site", lambda job, parties: site)
    monkeypatch.setattr(run_module, "party_tokens", lambda site, located: data[located.party.name])
    monkeypatch.setattr(run_module, "write_report", lambda path: (path / "report.html").write_text("report"))


def go_on(federation: TinyFederation, name: str) -> RunResult:
    """Return the result of resuming, or of starting where the run had not begun yet.

    Args:
        federation: Whose job runs.
        name: The run folder.
    """
    try:
        return resume(federation.folder / name)
    except ConfigError as error:
        assert error.code == "RUN_NOT_FOUND"
        return federation.run(name)


def lasting(rows: list[Row]) -> list[Any]:
    """Return rows without what differs from run to run (seconds) or when tensors are sent again (bytes), sorted.

    Args:
        rows: Metric rows.
    """
    kept = [row for row in rows if not row["name"].startswith(("seconds_", "bytes_"))]
    return sorted(((*map(str, key), row["value"]) for key, row in zip(row_keys(kept), kept, strict=True)), key=str)


def committed_once(path: Path, rounds: int) -> None:
    """Assert that each round was committed once, in order, and that no metric stands twice.

    Args:
        path: The run folder.
        rounds: Rounds of the run.
    """
    steps = [(row["round"], row["step"]) for row in read_rows(path / "journal.jsonl")]
    assert [number for number, step in steps if step == "commit"] == list(range(rounds + 1)), steps
    for file in [path / "metrics.jsonl", *path.glob("parties/*/metrics.jsonl")]:
        keys = row_keys(read_rows(file))
        assert len(set(keys)) == len(keys), (file, [key for key in keys if keys.count(key) > 1])
        assert {key[0] for key in keys} == set(range(rounds + 1)), file
