"""A site's own guard: what is asked of it is checked against its limits and noted, and so is what leaves it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.errors import PayloadError
from fedllm.job.job import Job
from fedllm.job.party import Party
from fedllm.job.policy import Upload, check_operation, check_upload
from fedllm.runs.audit_log import AuditLog
from fedllm.runs.control import read_object
from fedllm.runs.jsonl import write_json
from fedllm.runtime.base import Head, Link, Seal, Wanted, Witness
from fedllm.wire.blob import Blob, Buffer
from fedllm.wire.frame import Frame, Parcel, unpack

_MAX_BYTES = 2**48


@dataclass
class Guard:
    """Stands before one party of a run. Where it raises, nothing is done and nothing leaves.

    Args:
        log: The site's audit log.
        job: The job.
        party: The site's own file.
        folder: The party's folder in the run, where what was sent is counted across restarts.
        run_id: The run.
    """

    log: AuditLog
    job: Job
    party: Party
    folder: Path
    run_id: str

    def asked(self, frame: Frame, parcel: Parcel) -> None:
        """Note a request, and return if the site answers its kind.

        Args:
            frame: The request, its lineage and its signature checked.
            parcel: As it came.

        Raises:
            PolicyError: `POLICY_REFUSED`.
            ResourceError: `DISK_FULL`: what cannot be noted is not done.
        """
        self._note("asked", frame, parcel)
        check_operation(frame.kind, job=self.job, party=self.party)

    def answered(self, frame: Frame, parcel: Parcel) -> None:
        """Count and note an answer, and return if it may leave.

        Args:
            frame: The answer.
            parcel: As it would leave.

        Raises:
            PolicyError: `POLICY_REFUSED`: with it, more would leave than the site allows.
            ResourceError: `DISK_FULL`.
        """
        path, number = self.folder / "sent.json", frame.envelope.round
        before = read_object(path)
        in_round = parcel.num_bytes + (before.get("in_round", 0) if before.get("round") == number else 0)
        sent = Upload(in_round, parcel.num_bytes + before.get("total", 0))
        if refused := check_upload(sent, self.party):
            raise refused[0]
        # Counted before it leaves: after a crash it may be counted twice, and never left out.
        write_json(path, {"round": number, "in_round": sent.per_round, "total": sent.total})
        self._note("answered", frame, parcel)

    def refused(self, code: str, *, round_: int | None = None) -> None:
        """Note that something was refused.

        Args:
            code: Why.
            round_: In which round it was asked.
        """
        self.log.append("message_refused", run_id=self.run_id, job_digest=self.job.digest, round=round_, code=code)

    def witness(self, witness: Witness, *, round_: int) -> Witness:
        """Note the heads of the others' audit logs, and return that of this one.

        Args:
            witness: What the server knows of.
            round_: The round that was just committed.
        """
        note_heads(self.log, witness, run_id=self.run_id, round_=round_)
        return heads_of(self.log, self.party.name)

    def _note(self, way: str, frame: Frame, parcel: Parcel) -> None:
        self.log.append(
            "operation",
            run_id=self.run_id,
            job_digest=self.job.digest,
            round=frame.envelope.round,
            peer=frame.envelope.sender if way == "asked" else frame.envelope.recipient,
            digest=digest_of(parcel),
            kind=frame.kind,
            way="asked" if way == "asked" else "answered",
            num_bytes=parcel.num_bytes,
        )


def digest_of(parcel: Parcel) -> str:
    """Return the SHA-256 of a message's head, which holds the digest of its tensors.

    Args:
        parcel: The message.
    """
    return hashlib.sha256(parcel.head).hexdigest()


def heads_of(log: AuditLog, name: str) -> Witness:
    """Return the newest line of an audit log, to be told to others; nothing of an empty one.

    Args:
        log: The log.
        name: Whose it is.
    """
    newest = log.head
    return Witness(heads={name: Head(n=newest.n, hash=newest.hash)} if newest.n >= 0 else {})


def note_heads(log: AuditLog, witness: Witness, *, run_id: str, round_: int) -> None:
    """Note the newest lines of others' audit logs in one's own.

    Args:
        log: One's own log.
        witness: What was told; a head of one's own among them is left out.
        run_id: The run.
        round_: The round that was just committed.
    """
    for peer, head in sorted(witness.heads.items()):
        if peer != log.actor and head.n >= 0:
            log.append("peer_head", run_id=run_id, round=round_, peer=peer, peer_n=head.n, digest=head.hash)


@dataclass
class Auditor:
    """The server's notes about one run.

    Args:
        log: The server's audit log.
        run_id: The run.
        job_digest: Its job.
    """

    log: AuditLog
    run_id: str
    job_digest: str
    _known: dict[str, Head] = field(default_factory=dict)

    def committed(self, number: int, digest: str) -> None:
        """Note that a round is committed.

        Args:
            number: The round.
            digest: SHA-256 of its checkpoint.
        """
        self.log.append("round_committed", run_id=self.run_id, job_digest=self.job_digest, round=number, digest=digest)

    def finished(self, number: int) -> None:
        """Note that the last round is done.

        Args:
            number: The round.
        """
        self.log.append("run_finished", run_id=self.run_id, job_digest=self.job_digest, round=number)

    def heads(self) -> Witness:
        """Return the newest lines of all logs that the server knows of."""
        return Witness(heads=self._known | heads_of(self.log, self.log.actor).heads)

    def note(self, party: str, witness: Witness, *, round_: int) -> None:
        """Note a party's newest line; what it says of others is not believed.

        Args:
            party: The party.
            witness: Its answer.
            round_: The round that was just committed.
        """
        own = {name: head for name, head in witness.heads.items() if name == party}
        self._known |= own
        note_heads(self.log, Witness(heads=own), run_id=self.run_id, round_=round_)


class AuditedLink:
    """A link whose messages are noted in the server's audit log before they leave and when they come."""

    def __init__(self, link: Link, log: AuditLog, *, run_id: str, job_digest: str) -> None:
        self._link, self._log = link, log
        self._facts = {"run_id": run_id, "job_digest": job_digest}

    @property
    def seal(self) -> Seal | None:
        """How messages are signed."""
        return self._link.seal

    @property
    def parties(self) -> tuple[str, ...]:
        """The parties, in the job's order."""
        return self._link.parties

    def keep(self, parts: Iterable[Buffer]) -> Blob:
        """Return a request's tensors as a blob.

        Args:
            parts: The blob's bytes in pieces.
        """
        return self._link.keep(parts)

    def exchange(
        self, messages: Mapping[str, Parcel], *, timeout_s: float, wanted: Wanted
    ) -> Iterator[tuple[str, Parcel | None]]:
        """Yield each party's answer; see `fedllm.runtime.base.Link`.

        Args:
            messages: One message per party.
            timeout_s: How long a party may work on its message.
            wanted: Which tensors to fetch.
        """
        for party, parcel in messages.items():
            self._note("asked", party, parcel)
        for party, answer in self._link.exchange(messages, timeout_s=timeout_s, wanted=wanted):
            if answer is not None:
                self._note("answered", party, answer)
            yield party, answer

    def close(self) -> None:
        """Let go of processes and connections."""
        self._link.close()

    def _note(self, way: str, party: str, parcel: Parcel) -> None:
        try:
            frame: Frame | None = unpack(parcel, max_bytes=_MAX_BYTES)
        except PayloadError:
            frame = None
        self._log.append(
            "operation",
            run_id=self._facts["run_id"],
            job_digest=self._facts["job_digest"],
            round=frame.envelope.round if frame else None,
            peer=party,
            digest=digest_of(parcel),
            kind=frame.kind[:64] if frame and frame.kind.isalnum() else None,
            way="asked" if way == "asked" else "answered",
            num_bytes=parcel.num_bytes,
        )
