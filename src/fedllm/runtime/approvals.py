"""A site's desk for approvals: what is looked at, approved and withdrawn there is in its audit log first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import ConfigError, PolicyError
from fedllm.identity.files import site_folder
from fedllm.identity.keys import load_key
from fedllm.identity.kit import Kit, open_kit
from fedllm.identity.signing import Signer
from fedllm.job.approval import (
    Approval,
    approvals,
    approve,
    check_approval,
    find_approval,
    limits_digest,
    withdraw,
)
from fedllm.job.job import Job, LocatedParty
from fedllm.job.loading import load_model
from fedllm.job.party import Party
from fedllm.runs.audit_log import AUDIT_FILE, AuditLog
from fedllm.runtime.consequences import Consequences, consequences


@dataclass(frozen=True)
class Listed:
    """One approval, and why it does not hold any more; empty where it holds."""

    approval: Approval
    why_not: str

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON value."""
        return self.approval.model_dump() | {"holds": not self.why_not, "why_not": self.why_not}


@dataclass(frozen=True)
class Desk:
    """Where a person at a site decides on jobs. `Desk.open` verifies the site's kit first."""

    located: LocatedParty
    kit: Kit
    log: AuditLog

    @classmethod
    def open(cls, party_file: Path) -> Desk:
        """Return the desk of the site that a party file is of.

        Args:
            party_file: The site's `party.yaml`; the site's folder is `site-NAME` beside it.

        Raises:
            ConfigError: The file is wrong.
            IdentityError: The site has no kit, or it is not as it was signed.
            StateLost: `AUDIT_BROKEN`.
        """
        party, _ = load_model(Party, party_file, overrides=[])
        kit = open_kit(site_folder(party_file, party.name))
        if kit.name != party.name:
            what = f"the site's kit is that of `{kit.name}`, the party file that of `{party.name}`"
            fix = "install the kit of this party"
            raise ConfigError("PARTY_UNKNOWN", what, where=str(party_file), fix=fix)
        located = LocatedParty(party=party, base_dir=party_file.resolve().parent)
        return cls(located, kit, AuditLog.open(kit.site / AUDIT_FILE, actor=kit.name))

    def look(self, job: Job) -> Consequences:
        """Return what a job will do here; a refusal by the site's own limits is noted.

        Args:
            job: The job.

        Raises:
            FedllmError: Why it cannot run here.
        """
        try:
            return consequences(job, self.located)
        except PolicyError as error:
            self.log.append("job_refused", job_digest=job.digest, code=error.code)
            raise

    def approve(self, job: Job) -> Approval:
        """Return the approval of a job, signed with the site's key. `look` comes first.

        Args:
            job: The job.

        Raises:
            FedllmError: It is not approved: what cannot be noted, signed or written is no approval.
        """
        party, signer = self.located.party, Signer(load_key(self.kit.key))
        self.log.append("job_approved", job_digest=job.digest, digest=limits_digest(party))
        return approve(job, party, signer=signer, folder=self.kit.site, project=self.kit.project)

    def list(self) -> list[Listed]:
        """Return all approvals of the site, each with why it does not hold."""
        return [Listed(approval, self._why_not(approval)) for approval in approvals(self.kit.site)]

    def _why_not(self, approval: Approval) -> str:
        kit, party = self.kit, self.located.party
        try:
            check_approval(approval.job_digest, party, folder=kit.site, verify=kit.roster.verify, project=kit.project)
        except PolicyError as error:
            return error.what
        return ""

    def withdraw(self, digest: str) -> Approval:
        """Return the approval that was withdrawn.

        Args:
            digest: The job's digest, or the beginning of it.

        Raises:
            ConfigError: `BAD_VALUE`: no approval fits, or more than one.
        """
        approval = find_approval(digest, folder=self.kit.site)
        self.log.append("approval_withdrawn", job_digest=approval.job_digest)
        withdraw(approval, folder=self.kit.site)
        return approval
