"""A party's part in the log of commitments: it shows its own, and signs heads that only add to what it signed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from fedllm.errors import FedllmError, PayloadError
from fedllm.job.job import Job
from fedllm.ownership.commitments import ClaimFolder, Commitment, need_bound
from fedllm.ownership.directions import share_of
from fedllm.ownership.keys import is_signed, public_hex, sign
from fedllm.ownership.log import (
    FOLDER,
    HEAD_PURPOSE,
    Head,
    OwnershipLog,
    SignedHead,
    broken,
    commitment_entry,
    party_entry,
    read_log,
    share_entry,
    unsound_shares,
)
from fedllm.ownership.merkle import root
from fedllm.runs.folder import RunFolder
from fedllm.runtime.base import HeadSigned, ShowCommitment, Shown, SignHead

# How far the server's clock may be from the party's, which signs the time.
_CLOCKS = timedelta(hours=1)


@dataclass(frozen=True)
class Signatory:
    """One party of a run. Its copy of the log, with all parties' signatures, is evidence that no server can take away.

    `commitment` is there for a claimant; `claimants` are the job's, and only they may commit, once each.
    """

    party: str
    run_id: str
    job_digest: str
    keys: ClaimFolder
    copy: Path
    commitment: Commitment | None
    claimants: tuple[str, ...]

    @classmethod
    def of(cls, job: Job, run: RunFolder, party: str, keys: ClaimFolder) -> Signatory:
        """Return a party's part in the log of a run.

        Args:
            job: The job.
            run: The run folder.
            party: The party.
            keys: Its folder of claims.

        Raises:
            ConfigError: `OWNERSHIP_UNCOMMITTED`.
        """
        commitment = keys.commitment(job.digest) if party in job.ownership.claimants else None
        copy, claimants = run.path / "parties" / party / FOLDER, tuple(job.ownership.claimants)
        return cls(party, run.run_id, run.job_digest, keys, copy, commitment, claimants)

    def answer(self, request: ShowCommitment | SignHead) -> Shown | HeadSigned:
        """Return the answer to one of the two requests.

        Args:
            request: The request.

        Raises:
            ConfigError: `OWNERSHIP_UNCOMMITTED`: the claim is of an earlier form than the log will be.
            StateLost: `OWNERSHIP_BROKEN`: the head does not follow on what the party has signed.
        """
        if isinstance(request, SignHead):
            return self._signed(request)
        if self.commitment and self.keys.claim_file(self.job_digest).exists():
            need_bound(self.keys.claim(self.job_digest), f"party {self.party}")
        text = self.commitment.model_dump_json() if self.commitment else ""
        return Shown(public_key=public_hex(self.keys.key()), commitment=text)

    def _signed(self, request: SignHead) -> HeadSigned:
        try:
            head = Head.model_validate_json(request.head)
        except ValidationError:
            raise PayloadError("PAYLOAD_REFUSED", "what is to be signed is no head", where=self.party) from None
        log = self._followed(read_log(self.copy), head, request)
        signature = sign(self.keys.key(), head.text(), purpose=HEAD_PURPOSE)
        # Kept before it leaves: what was signed once is never forgotten.
        log.with_head(SignedHead(head=head, signatures={self.party: signature})).write(self.copy)
        is_first = not log.has("share") and not log.has("round")
        return HeadSigned(signature=signature, share=share_of(self.keys.key(), log.first_root()) if is_first else "")

    def _followed(self, own: OwnershipLog, head: Head, request: SignHead) -> OwnershipLog:
        """Return the party's copy with the new entries, if the head follows on it."""
        size = own.heads[-1].head.size if own.heads else 0
        log = OwnershipLog((*own.entries[: request.since], *request.entries), own.heads)
        if log.entries[:size] != own.entries[:size] or request.since > size:
            raise self._refused("entries that the party has signed were changed or taken out")
        if head.size != len(log.entries) or head.root != root(log.leaves).hex():
            raise self._refused("the head is not that of its entries")
        if (head.run_id, head.job_digest) != (self.run_id, self.job_digest):
            raise self._refused("the head is of another run")
        if own.heads and head.time < own.heads[-1].head.time:
            raise self._refused("the head is older than the last one")
        if abs(datetime.now(UTC) - datetime.fromisoformat(head.time)) > _CLOCKS:
            raise self._refused("the server's clock is more than an hour from the party's")
        missing = {party_entry(self.party, public_hex(self.keys.key()))}
        missing |= {commitment_entry(self.commitment)} if self.commitment else set()
        # A run of an earlier version has rounds without shares in what was signed already.
        if own.heads and log.has("round") and not own.has("round"):
            missing.add(share_entry(self.party, share_of(self.keys.key(), own.first_root())))
        if missing - set(log.entries):
            raise self._refused("the party's own key, commitment or share is not in the log")
        if wrong := log.against_commitments(self.claimants):
            raise self._refused(f"the log has {'; '.join(wrong)[:300]}")
        if log.shares() and (unsound_shares(log) or log.shares().keys() != log.keys().keys()):
            raise self._refused("the shares in the log are not the parties' signatures of its first root")
        return OwnershipLog(log.entries, _completed(log, request))

    def _refused(self, what: str) -> FedllmError:
        return broken(what, self.copy)


def _completed(log: OwnershipLog, request: SignHead) -> tuple[SignedHead, ...]:
    """Return the heads, that of size `since` with the signatures of all."""
    keys, heads = log.keys(), []
    for signed in log.heads:
        if signed.head.size == request.since:
            sound = {
                party: signature
                for party, signature in request.signatures.items()
                if is_signed(keys.get(party, ""), signed.head.text(), signature, purpose=HEAD_PURPOSE)
            }
            signed = SignedHead(head=signed.head, signatures=signed.signatures | sound)
        heads.append(signed)
    return tuple(heads)
