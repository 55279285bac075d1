"""A party's book of the sums that it opened: one for all runs, so that none is opened again for other parties.

What a party sends follows from the job, the round, and what it is asked. If a server could have a sum opened for some
parties, and again for all of them but one, be it in another run or round, it would know that one's part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fedllm.disk import hold, make_private, sync_folder
from fedllm.errors import PayloadError, StateLost
from fedllm.runs.jsonl import write_json

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Opened:
    """A sum that a party opened, or is about to.

    Args:
        run: The run.
        round: The round.
        what: What was summed.
        asked: SHA-256 of the request.
        tensors: SHA-256 of the request's tensors; empty where it has none.
        parties: Who is in the sum, in order of names.
    """

    run: str
    round: int
    what: str
    asked: str
    tensors: str
    parties: tuple[str, ...]

    def isolates(self, other: Opened) -> bool:
        """Return whether this sum and another one are of the same answers, but not of the same parties.

        Args:
            other: Of the same job.
        """
        again = self.round == other.round or (self.tensors != "" and self.tensors == other.tensors)
        return self.what == other.what and again and self.parties != other.parties

    def replaces(self, other: Opened) -> bool:
        """Return whether this sum stands in the place of another one of its run, which was of another request.

        Args:
            other: Of the same job.
        """
        place = (self.run, self.round, self.what) == (other.run, other.round, other.what)
        return place and self.asked != other.asked


@dataclass(frozen=True)
class SumBook:
    """The sums of one party, a page for each job.

    Args:
        folder: Where the pages are.
        party: The party, for errors.
    """

    folder: Path
    party: str

    def page(self, job_digest: str) -> Path:
        """Return the file of a job's sums.

        Args:
            job_digest: The job.
        """
        return self.folder / f"{job_digest}.json"

    def check(self, job_digest: str, new: Opened) -> None:
        """Return if a sum may be opened.

        Args:
            job_digest: The job.
            new: The sum.

        Raises:
            PayloadError: `COHORT_CHANGED`.
            StateLost: `STATE_CORRUPT`.
        """
        self._check(self._read(job_digest), new)

    def note(self, job_digest: str, new: Opened) -> None:
        """Write a sum down durably, before it is opened; of two runs at once the later one finds what the first wrote.

        Args:
            job_digest: The job.
            new: The sum.

        Raises:
            ConfigError: `RUN_EXISTS`, another process holds the page for too long.
            PayloadError: `COHORT_CHANGED`.
            ResourceError: `DISK_FULL`.
            StateLost: `STATE_CORRUPT`.
        """
        make_private(self.folder)
        page = self.page(job_digest)
        what, fix = "another process is writing this book of sums", "wait for it, or stop it"
        lock = hold(page.with_suffix(".lock"), what, fix=fix, patience_s=_PATIENCE_S)
        try:
            held = self._read(job_digest)
            self._check(held, new)
            if new in held:
                return
            write_json(page, [asdict(opened) for opened in (*held, new)])
            if not held:
                sync_folder(self.folder.parent)
        finally:
            lock.close()

    def _check(self, held: Iterable[Opened], new: Opened) -> None:
        for old in held:
            if new.isolates(old):
                others = f"other parties: {', '.join(old.parties)}"
            elif new.replaces(old):
                others = "another request"
            else:
                continue
            raise PayloadError(
                "COHORT_CHANGED",
                f"the sum of `{new.what}` of round {old.round} was opened for {others}",
                where=f"party {self.party}, round {new.round}",
                fix="have the same parties take part; if one is gone for good, start another job, of another seed say",
            )

    def _read(self, job_digest: str) -> list[Opened]:
        page = self.page(job_digest)
        if not page.exists():
            return []
        try:
            rows = json.loads(page.read_text(encoding="utf-8"))
            return [Opened(**row | {"parties": tuple(row["parties"])}) for row in rows]
        except (OSError, ValueError, TypeError, KeyError):
            raise StateLost(
                "STATE_CORRUPT",
                "the file that keeps sums from being opened for other parties cannot be read",
                where=str(page),
                fix="restore it from a backup, or start another job, of another seed say",
            ) from None
