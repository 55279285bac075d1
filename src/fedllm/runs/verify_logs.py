"""What the checks of a finished run look at, and the checks of its logs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedllm.errors import ConfigError
from fedllm.job.job import Job
from fedllm.ownership.log import OwnershipLog, check_log, find_log, read_log, round_entry
from fedllm.runs.audit_log import AUDIT_FILE
from fedllm.runs.audit_log import read_log as read_audit_log
from fedllm.runs.audit_verify import examine_log
from fedllm.runs.checkpoint import Generations
from fedllm.runs.digests import Seal, read_seal, site_of
from fedllm.runs.folder import run_identity
from fedllm.runs.jsonl import read_rows


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of a run; `file` is its path from the run folder, or that of a log."""

    file: str
    what: str


@dataclass
class Look:
    """A run that is being checked, with what several checks need.

    Args:
        path: The run folder.
        site: A site of the project, for its roster; by default the one that the run belongs to.
        peers: Audit logs of other sites.
        expected_seal: The digest of digests.json that was noted elsewhere; empty for none.
    """

    path: Path
    site: Path | None
    peers: Sequence[Path] = ()
    expected_seal: str = ""
    problems: list[Problem] = field(default_factory=list)

    @cached_property
    def seal(self) -> Seal | None:
        """What digests.json says."""
        return read_seal(self.path)

    @cached_property
    def identity(self) -> dict[str, str]:
        """`run_id` and `job_digest`."""
        return run_identity(self.path)

    @cached_property
    def commits(self) -> dict[int, str]:
        """Round -> SHA-256 of the checkpoint that the journal noted last."""
        rows = read_rows(self.path / "journal.jsonl")
        return {row["round"]: str(row.get("sha256")) for row in rows if row.get("step") == "commit"}

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the run, noting it where it cannot be read.

        Args:
            name: Its path.
        """
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            self.wrong(name, "it is missing, or no JSON object")
            return {}
        return found

    def states(self, owner: str, folder: Path) -> Generations:
        """Return the checkpoints of one half.

        Args:
            owner: `server`, or a party.
            folder: Where they are.
        """
        return Generations(folder, owner, self.identity["job_digest"], self.identity["run_id"])

    def wrong(self, file: str, what: str) -> None:
        """Note a problem.

        Args:
            file: Where.
            what: What is wrong.
        """
        self.problems.append(Problem(file, what))


def check_audit_log(look: Look) -> str:
    """Note where the audit log of the run's site is not whole, or commits other checkpoints than the journal.

    Args:
        look: The run.
    """
    if look.site is None or site_of(look.path) is None:
        return ""
    path = look.site / AUDIT_FILE
    verdict = examine_log(path, look.peers)
    for problem in verdict.problems:
        place = problem.file if problem.line is None else f"{problem.file}:{problem.line}"
        look.wrong(place, f"{problem.kind}: {problem.what}")
    entries = [entry for _, _, entry in read_audit_log(path) if entry and entry.run_id == look.identity["run_id"]]
    noted = {entry.round: entry.digest for entry in entries if entry.event == "round_committed"}
    for number, digest in look.commits.items():
        if noted.get(number) != digest:
            look.wrong("journal.jsonl", f"the audit log noted another checkpoint of round {number}, or none")
    return f"{verdict.lines} lines of {verdict.actor}; {len(noted)} rounds as the journal has them"


def check_commitments(look: Look) -> str:
    """Note where the log of ownership commitments is not as all signed it, lacks a claimant's, or names other rounds.

    Args:
        look: The run.
    """
    try:
        folder = find_log(look.path)
    except ConfigError:
        if _job(look).ownership.enabled:
            look.wrong("ownership", "the log of commitments is missing, and the model is claimed")
        return ""
    log = read_log(folder)
    check_log(log, where=folder)
    for number, digest in look.commits.items():
        if number and round_entry(number, digest) not in log.entries:
            look.wrong("journal.jsonl", f"the log of commitments has another checkpoint of round {number}, or none")
    for what in (*_against_signers(log, _job(look)), *log.against_commitments(_job(look).ownership.claimants)):
        look.wrong("ownership", f"the log of commitments has {what}")
    newest = log.heads[-1]
    return (
        f"{len(log.entries)} entries, {len(log.commitments())} commitments, signed by {len(newest.signatures)} parties"
    )


def _job(look: Look) -> Job:
    return Job.from_yaml(look.path / "job.yaml")


def _against_signers(log: OwnershipLog, job: Job) -> Iterator[str]:
    """Yield where not all parties signed what was there before round 0, or nobody signed what came last."""
    if log.keys().keys() != set(job.parties):
        yield "keys of other parties than the job's"
    rounds = [number for number, entry in enumerate(log.entries) if json.loads(entry)["kind"] == "round"]
    begun = min(rounds, default=len(log.entries))
    opening = [signed for signed in log.heads if signed.head.size <= begun]
    for signed in opening:
        if missing := sorted(set(job.parties) - signed.signatures.keys()):
            yield f"a head from before round 0 that is not signed by {', '.join(missing)}"
    if opening[-1].head.size < begun:
        yield f"{begun - opening[-1].head.size} entries from before round 0 that no head of that time is over"
    if log.shares().keys() != log.keys().keys():
        yield "not the shares of all parties"
    signed_entries = max((one.head.size for one in log.heads if one.signatures), default=0)
    if signed_entries < len(log.entries):
        yield f"{len(log.entries) - signed_entries} entries at its end that nobody signed"
