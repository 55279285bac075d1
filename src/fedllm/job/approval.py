"""Approvals: a site signs the digest of a job that a person there has looked at, together with its own limits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedllm.disk import disk_error, make_private, sync_folder, write_atomic
from fedllm.errors import ConfigError, FedllmError, PolicyError
from fedllm.identity.signing import Purpose
from fedllm.job.party import NAME_PATTERN, Party
from fedllm.job.policy import check_policy
from fedllm.models.digest import json_digest

if TYPE_CHECKING:
    from fedllm.job.job import Job

APPROVALS = "approvals"
_DIGEST = r"^[0-9a-f]{64}$"
_MAX_BYTES = 2**16
_AGAIN = "look at the job with `fedllm approve JOB --party party.yaml`, and approve it there if it is right"


class Signs(Protocol):
    """Signs with a site's key; `fedllm.identity.signing.Signer` does."""

    def sign(self, data: bytes, *, purpose: Purpose) -> bytes:
        """Return a signature of the data."""
        ...


class Verifies(Protocol):
    """Raises where a site did not sign these data; `fedllm.identity.signing.Roster.verify` does."""

    def __call__(self, name: str, data: bytes, signature: bytes, *, purpose: Purpose) -> None:
        """Return if the named site signed exactly these data."""
        ...


class Approval(BaseModel):
    """One job that one site approved, under the limits that it had then."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    job_digest: str = Field(pattern=_DIGEST)
    job_name: str = Field(pattern=NAME_PATTERN)
    project: str = Field(pattern=NAME_PATTERN)
    party: str = Field(pattern=NAME_PATTERN)
    limits_digest: str = Field(pattern=_DIGEST)
    base_dir: str = Field(max_length=4096, description="Where the job's relative paths begin at this site.")
    approved_at: str = Field(pattern=r"^[0-9T:.+-]{19,40}$")
    signature: str = Field(pattern=r"^([0-9a-f]{2}){1,2048}$")

    def signed_bytes(self) -> bytes:
        """Return what the signature covers: the digest of all other fields."""
        return json_digest(self.model_dump(exclude={"signature"})).encode()


def limits_digest(party: Party) -> str:
    """Return the SHA-256 of a site's limits.

    Args:
        party: The site's own file.
    """
    return json_digest(party.limits.model_dump(mode="json"))


def approve(job: Job, party: Party, *, signer: Signs, folder: Path, project: str) -> Approval:
    """Return a site's approval of a job, written to `approvals/` in the site's folder.

    Args:
        job: The job.
        party: The site's own file.
        signer: Signs with the site's key.
        folder: The site's folder.
        project: The project that the site's kit is of.

    Raises:
        PolicyError: `POLICY_REFUSED`: the site's own limits forbid the job; nothing is written.
        ResourceError: `DISK_FULL`.
    """
    if refused := check_policy(job, party):
        refused[0].also = tuple(refused[1:])
        raise refused[0]
    draft = Approval(
        job_digest=job.digest,
        job_name=job.name,
        project=project,
        party=party.name,
        limits_digest=limits_digest(party),
        base_dir=str(job.base_dir),
        approved_at=datetime.now(UTC).isoformat(timespec="seconds"),
        signature="00",
    )
    signature = signer.sign(draft.signed_bytes(), purpose="approval").hex()
    approval = draft.model_copy(update={"signature": signature})
    path = _path(folder, approval.job_digest)
    make_private(path.parent)
    write_atomic(path, (approval.model_dump_json(indent=2) + "\n").encode())
    return approval


def check_approval(job_digest: str, party: Party, *, folder: Path, verify: Verifies, project: str) -> Approval:
    """Return the approval under which a site may run a job.

    Args:
        job_digest: The digest of the job as it arrived, computed here.
        party: The site's own file, as it is now.
        folder: The site's folder.
        verify: Checks the site's signature.
        project: The project that the site's kit is of.

    Raises:
        PolicyError: `NOT_APPROVED`: there is none, or it does not hold.
    """
    path = _path(folder, job_digest)
    if not path.is_file():
        raise _not_approved(f"the job with the digest {job_digest} is not approved at `{party.name}`", path)
    approval = _read(path)
    if approval is None:
        raise _not_approved("the file is no approval", path)
    asked = {"job_digest": job_digest, "project": project, "party": party.name}
    for name, value in asked.items():
        if (found := getattr(approval, name)) != value:
            raise _not_approved(f"the approval is for the {name.replace('_', ' ')} {found}, not for {value}", path)
    try:
        verify(party.name, approval.signed_bytes(), bytes.fromhex(approval.signature), purpose="approval")
    except FedllmError as error:
        raise _not_approved(f"the approval is not signed by `{party.name}` ({error.code})", path) from None
    if approval.limits_digest != limits_digest(party):
        raise _not_approved("the site's limits have changed since the job was approved", path)
    return approval


def admit(job: Job, party: Party, *, folder: Path, verify: Verifies, project: str) -> Approval | None:
    """Return the approval under which a job that arrived may run at a site; None where the site asks for none.

    Args:
        job: The job as it arrived.
        party: The site's own file.
        folder: The site's folder.
        verify: Checks the site's signature.
        project: The project that the site's kit is of.

    Raises:
        PolicyError: `POLICY_REFUSED` or `NOT_APPROVED`.
    """
    if refused := check_policy(job, party):
        refused[0].also = tuple(refused[1:])
        raise refused[0]
    if not party.limits.require_approval:
        return None
    return check_approval(job.digest, party, folder=folder, verify=verify, project=project)


def approvals(folder: Path) -> Iterator[Approval]:
    """Yield a site's approvals by digest, unverified; files that are none are passed over.

    Args:
        folder: The site's folder.
    """
    for path in sorted((folder / APPROVALS).glob("*.json")):
        if (approval := _read(path)) and path.stem == approval.job_digest:
            yield approval


def find_approval(digest: str, *, folder: Path) -> Approval:
    """Return the approval of a job by its digest, or by the beginning of it.

    Args:
        digest: The digest, or what tells it from the others.
        folder: The site's folder.

    Raises:
        ConfigError: `BAD_VALUE`: no approval fits, or more than one.
    """
    found = [approval for approval in approvals(folder) if digest and approval.job_digest.startswith(digest)]
    if len(found) != 1:
        what = f"{len(found)} approvals begin with {digest[:64]!r}"
        raise ConfigError("BAD_VALUE", what, where=str(folder / APPROVALS), fix="`fedllm approve --list` shows them")
    return found[0]


def withdraw(approval: Approval, *, folder: Path) -> None:
    """Remove an approval durably. A run that has begun is not stopped by it until it starts again.

    Args:
        approval: The approval.
        folder: The site's folder.

    Raises:
        ResourceError: `DISK_FULL`.
    """
    path = _path(folder, approval.job_digest)
    try:
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from None


def _path(folder: Path, digest: str) -> Path:
    if not re.fullmatch(_DIGEST, digest):
        raise PolicyError("NOT_APPROVED", f"{digest[:64]!r} is no digest of a job", fix=_AGAIN)
    return folder / APPROVALS / f"{digest}.json"


def _read(path: Path) -> Approval | None:
    try:
        with path.open("rb") as file:
            return Approval.model_validate_json(file.read(_MAX_BYTES))
    except (OSError, ValidationError):
        return None


def _not_approved(what: str, path: Path) -> PolicyError:
    return PolicyError("NOT_APPROVED", what, where=str(path), fix=_AGAIN)
