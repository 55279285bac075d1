"""The server's part in the log of commitments: entries before round 0 and after each round, heads that all sign."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fedllm.errors import FedllmError, RunFailed, RunPaused
from fedllm.job.job import Job
from fedllm.ownership.commitments import Commitment
from fedllm.ownership.directions import is_share
from fedllm.ownership.keys import is_signed
from fedllm.ownership.log import (
    FOLDER,
    HEAD_PURPOSE,
    OwnershipLog,
    SignedHead,
    commitment_entry,
    party_entry,
    read_log,
    round_entry,
    share_entry,
)
from fedllm.runs.folder import RunFolder, now
from fedllm.runtime.base import HeadSigned, ShowCommitment, Shown, SignHead
from fedllm.runtime.federation import LinkedFederation
from fedllm.wire.payload import Failure, Payload


@dataclass
class Notary:
    """Keeps the log of one run; what it may not do is held by the parties, who sign only what follows on their copy.

    Args:
        run: The run folder.
        claimants: Parties that must commit.
    """

    run: RunFolder
    claimants: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where the log is."""
        return self.run.path / FOLDER

    def open(self, federation: LinkedFederation) -> None:
        """Collect keys and commitments before round 0, then shares, and have both signed; nothing where that is done.

        Args:
            federation: The parties.

        Raises:
            RunFailed: `OWNERSHIP_UNCOMMITTED`, or `BAD_SIGNATURE`; `OWNERSHIP_BROKEN` where a party refuses to sign.
            RunPaused: A party did not answer.
        """
        log = read_log(self.folder)
        if log.has("round"):
            return
        if not log.has("share"):
            log = self._shared(federation, log if log.heads else self._shown(federation))
            # Kept before it is signed: the parties' shares cannot change, and a crash may come in between.
            log.write(self.folder)
        if log.heads[-1].head.size < len(log.entries):
            self._by_all(self._sign(federation, log, 0)[0], federation).write(self.folder)

    def _shared(self, federation: LinkedFederation, log: OwnershipLog) -> OwnershipLog:
        signed, shares = self._sign(federation, log, 0)
        signed = self._by_all(signed, federation)
        if missing := [party for party in federation.parties if party not in shares]:
            what = "its share is not its signature of the log's root"
            raise RunFailed("BAD_SIGNATURE", what, where=f"party {', '.join(missing)}")
        return signed.with_entries(*(share_entry(party, shares[party]) for party in federation.parties))

    def _by_all(self, log: OwnershipLog, federation: LinkedFederation) -> OwnershipLog:
        if missing := [party for party in federation.parties if party not in log.heads[-1].signatures]:
            raise RunPaused("QUORUM", "the log of commitments is not signed", where=f"party {', '.join(missing)}")
        return log

    def _shown(self, federation: LinkedFederation) -> OwnershipLog:
        shown: dict[str, Shown] = {}
        for reply in federation.ask(ShowCommitment(), round_=0, to=federation.parties):
            if not isinstance(reply.payload, Shown):
                raise _failed(reply.party, reply.payload)
            shown[reply.party] = reply.payload
        order = [party for party in federation.parties if party in shown]
        keys = [party_entry(party, shown[party].public_key) for party in order]
        commitments = [commitment_entry(self._commitment(name, shown.get(name))) for name in self.claimants]
        return OwnershipLog((*keys, *commitments))

    def _commitment(self, party: str, shown: Shown | None) -> Commitment:
        where = f"party {party}"
        if shown is None or not shown.commitment:
            fix = "at the party: `fedllm ownership commit job.yaml --party party.yaml`"
            raise RunFailed(
                "OWNERSHIP_UNCOMMITTED", "it claims the model and shows no commitment", where=where, fix=fix
            )
        try:
            found = Commitment.model_validate_json(shown.commitment)
        except ValidationError:
            raise RunFailed("BAD_SIGNATURE", "what it shows is no commitment", where=where) from None
        named = (found.party, found.job_digest, found.public_key)
        if named != (party, self.run.job_digest, shown.public_key):
            what = "its commitment is to another job, or of another party or key"
            raise RunFailed("OWNERSHIP_UNCOMMITTED", what, where=where, fix="commit to this job, then run it")
        if not found.is_sound():
            raise RunFailed("BAD_SIGNATURE", "its commitment is not signed by the key that it names", where=where)
        return found

    def committed(self, federation: LinkedFederation, number: int, checkpoint: str) -> None:
        """Add a committed round to the log, and have it signed.

        A party that does not answer is missed in this head; the round that is committed stands.

        Args:
            federation: The parties.
            number: The round.
            checkpoint: SHA-256 of the server's checkpoint.

        Raises:
            RunFailed: `OWNERSHIP_BROKEN`: a party found that the log does not follow on what it signed.
        """
        log = read_log(self.folder).with_entries(round_entry(number, checkpoint))
        self._sign(federation, log, number)[0].write(self.folder)

    def _sign(
        self, federation: LinkedFederation, log: OwnershipLog, number: int
    ) -> tuple[OwnershipLog, dict[str, str]]:
        head = log.head(number, now(), run_id=self.run.run_id, job_digest=self.run.job_digest)
        requests: dict[str, Payload] = {
            party: _request(log, head.model_dump_json(), party) for party in federation.parties
        }
        signatures: dict[str, str] = {}
        shares: dict[str, str] = {}
        for reply in federation.ask(requests, round_=number, to=federation.parties):
            found = reply.payload
            key = log.keys().get(reply.party, "")
            if isinstance(found, Failure) and found.code == "OWNERSHIP_BROKEN":
                raise _failed(reply.party, found)
            if isinstance(found, HeadSigned) and is_signed(key, head.text(), found.signature, purpose=HEAD_PURPOSE):
                signatures[reply.party] = found.signature
                if is_share(key, log.first_root(), found.share):
                    shares[reply.party] = found.share
        return log.with_head(SignedHead(head=head, signatures=signatures)), shares


def _request(log: OwnershipLog, head: str, party: str) -> SignHead:
    last = next((one for one in reversed(log.heads) if party in one.signatures), None)
    since = last.head.size if last else 0
    signatures = last.signatures if last else {}
    return SignHead(head=head, since=since, entries=list(log.entries[since:]), signatures=signatures)


def _failed(party: str, payload: Payload) -> FedllmError:
    code = payload.code if isinstance(payload, Failure) else "PAYLOAD_REFUSED"
    error = RunPaused if code == "ROUND_TIMEOUT" else RunFailed
    fix = "see the party's own log; then `fedllm resume RUN`"
    return error(code, "it does not take part in the log of commitments", where=f"party {party}", fix=fix)


def notary_of(job: Job, run: RunFolder) -> Notary | None:
    """Return the keeper of a run's log of commitments, or None where nobody claims the model.

    Args:
        job: The job.
        run: The run folder.
    """
    return Notary(run, tuple(job.ownership.claimants)) if job.ownership.enabled else None
