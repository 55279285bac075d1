"""A signed commitment to a claim, and the folder where a party keeps its key, its claims and their commitments."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedllm.disk import write_atomic
from fedllm.errors import ConfigError, IdentityError
from fedllm.ownership.claims import BOUND, CLAIM_SUFFIX, Claim, load_claim, save_claim, stamp_file
from fedllm.ownership.keys import is_signed, open_key, public_hex, sign

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_HEX = r"^[0-9a-f]{64}$"
_PURPOSE = "commitment"
_MAX_STAMP_BYTES = 2**16


class Commitment(BaseModel):
    """What a claimant shows before round 0. It tells nothing of the claim, and binds it to one job and one base.

    `stamp` is the SHA-256 of a time stamp (RFC 3161) on `digest`, which stays beside the claim; empty without one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    party: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    job_digest: str = Field(pattern=_HEX)
    base_digest: str = Field(pattern=_HEX)
    digest: str = Field(pattern=_HEX)
    stamp: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    public_key: str = Field(pattern=_HEX)
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")

    def text(self) -> bytes:
        """Return what is signed: all but the signature, in one spelling."""
        fields = self.model_dump(mode="json", exclude={"signature"})
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    def is_sound(self) -> bool:
        """Return whether the key that it names signed it."""
        return is_signed(self.public_key, self.text(), self.signature, purpose=_PURPOSE)


def commit_to(claim: Claim, key: Ed25519PrivateKey, *, stamp: str = "") -> Commitment:
    """Return the signed commitment to a claim.

    Args:
        claim: The claim.
        key: The party's signing key.
        stamp: SHA-256 of a time stamp on the claim's commitment.
    """
    facts = {
        "party": claim.party,
        "job_digest": claim.job_digest,
        "base_digest": claim.base_digest,
        "digest": claim.commitment(),
        "stamp": stamp,
        "public_key": public_hex(key),
    }
    unsigned = Commitment.model_validate(facts | {"signature": "0" * 128})
    return unsigned.model_copy(update={"signature": sign(key, unsigned.text(), purpose=_PURPOSE)})


@dataclass(frozen=True)
class ClaimFolder:
    """A party's own folder: `key.pem`, and per job a claim and its commitment."""

    root: Path

    def key(self) -> Ed25519PrivateKey:
        """Return the signing key, made at the first call; see `open_key`."""
        return open_key(self.root)

    def claim_file(self, job_digest: str) -> Path:
        """Return where the claim on a job's model is.

        Args:
            job_digest: The job.
        """
        return self.root / f"{job_digest[:16]}{CLAIM_SUFFIX}"

    def commitment_file(self, job_digest: str) -> Path:
        """Return where the commitment to it is.

        Args:
            job_digest: The job.
        """
        return self.root / f"{job_digest[:16]}.commitment.json"

    def write(self, claim: Claim) -> Commitment:
        """Write a new claim and return its commitment, written too.

        Args:
            claim: The claim.

        Raises:
            IdentityError: `KEY_EXISTS`, there is a claim on this job's model already.
            ResourceError: `DISK_FULL`.
        """
        key = self.key()
        save_claim(claim, self.claim_file(claim.job_digest))
        return self._write(commit_to(claim, key))

    def attach(self, job_digest: str, stamp: Path) -> Commitment:
        """Return the commitment with the digest of a time stamp in it, written and signed anew.

        That the stamp is of this commitment is checked here; the chain of the authority that made it is checked by who
        verifies the claim, see `fedllm.ownership.stamps`.

        Args:
            job_digest: The job.
            stamp: The answer of a time stamping authority (RFC 3161) on the commitment's digest.

        Raises:
            ConfigError: `BAD_VALUE`, it is a stamp on something else; or `OWNERSHIP_UNCOMMITTED`.
        """
        claim = self.claim(job_digest)
        data = _stamp_of(stamp, claim)
        write_atomic(stamp_file(self.claim_file(job_digest)), data)
        return self._write(commit_to(claim, self.key(), stamp=hashlib.sha256(data).hexdigest()))

    def _write(self, commitment: Commitment) -> Commitment:
        text = json.dumps(commitment.model_dump(mode="json"), indent=1) + "\n"
        write_atomic(self.commitment_file(commitment.job_digest), text.encode())
        return commitment

    def claim(self, job_digest: str) -> Claim:
        """Return the claim on a job's model.

        Args:
            job_digest: The job.

        Raises:
            ConfigError: `OWNERSHIP_UNCOMMITTED`, there is none.
            IdentityError: Others can read it.
        """
        path = self.claim_file(job_digest)
        if not path.exists():
            raise uncommitted(str(path.parent))
        return load_claim(path)

    def commitment(self, job_digest: str) -> Commitment:
        """Return the commitment to the claim on a job's model; it opens to that claim.

        Args:
            job_digest: The job.

        Raises:
            ConfigError: `OWNERSHIP_UNCOMMITTED`.
            IdentityError: `BAD_SIGNATURE`, the claim or the commitment was changed.
        """
        claim, path = self.claim(job_digest), self.commitment_file(job_digest)
        try:
            found = Commitment.model_validate_json(path.read_bytes())
        except OSError:
            # A crash came between the claim and its commitment.
            return self._write(commit_to(claim, self.key()))
        except ValidationError:
            raise _changed(path) from None
        if found.digest != claim.commitment() or found.party != claim.party or not found.is_sound():
            raise _changed(path)
        return found


def _stamp_of(path: Path, claim: Claim) -> bytes:
    fix = f"stamp this digest: `openssl ts -query -sha256 -digest {claim.commitment()} -cert -out query.tsq`"
    try:
        data = path.read_bytes()[: _MAX_STAMP_BYTES + 1]
    except OSError as error:
        raise ConfigError("FILE_NOT_FOUND", f"cannot read: {error.strerror}", where=str(path), fix=fix) from None
    # DER holds the stamped hash as it is.
    if len(data) > _MAX_STAMP_BYTES or bytes.fromhex(claim.commitment()) not in data:
        raise ConfigError("BAD_VALUE", "not a time stamp on this commitment", where=str(path), fix=fix)
    return data


def _changed(path: Path) -> IdentityError:
    fix = "restore the folder from a backup: a changed claim does not open its commitment"
    return IdentityError("BAD_SIGNATURE", "the commitment is not to the claim beside it", where=str(path), fix=fix)


def need_bound(claim: Claim, where: str) -> None:
    """Return if a run would bear out a claim: if it is of the form that says, with the log, where its bits are.

    Args:
        claim: The claim.
        where: The party, or its folder.

    Raises:
        ConfigError: `OWNERSHIP_UNCOMMITTED`.
    """
    if claim.form != BOUND:
        what = f"the claim is of the form {claim.form}, of which nothing says that its key was not chosen afterwards"
        fix = "move the claim and its commitment out of the folder, and run `fedllm ownership commit job.yaml` again"
        raise ConfigError("OWNERSHIP_UNCOMMITTED", what, where=where, fix=fix)


def uncommitted(where: str) -> ConfigError:
    """Return the error for a party that claims a model and has not committed to a claim.

    Args:
        where: The party, or its folder.
    """
    what = "the job names this party as a claimant, and it has not committed to a claim (E23)"
    fix = "run `fedllm ownership commit job.yaml` with the party's file, or take it out of `ownership.claimants`"
    return ConfigError("OWNERSHIP_UNCOMMITTED", what, where=where, fix=fix)
