"""A claim: what a party keeps secret, and the hash by which it commits to it before a run.

Source: the ambiguity attack on FedIPR (Li et al. 2022, arXiv:2109.13236, section 3.4): who picks a key after seeing a
model finds it in any model. So a claimant commits first: c = SHA-256("fedllm own-v2", job, base, key seed, bits,
triggers, threshold, salt).
"""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedllm.errors import ConfigError
from fedllm.identity.keys import read_private, save_private
from fedllm.ownership.settings import Carrier

_HEX = r"^[0-9a-f]{64}$"
_MAX_CLAIM_BYTES = 2**24
# The one form of a claim: where its bits are follows from the key together with the log, see `ownership.directions`.
BOUND = "own-v2"
# A claim as it is read, with the key that `directed` drew; no file has this form, and no log bears it out.
DRAWN = "drawn"
CLAIM_SUFFIX = ".claim.json"
_STAMP_SUFFIX = ".stamp.tsr"


class Trigger(BaseModel):
    """A secret prompt, and the secret answer that a marked model gives to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1)


class MarkSite(BaseModel):
    """A weight in which bits are hidden, by the name that it has in the base model.

    A matrix is (out, in), or (in, out) where `transposed`; of a norm's scale `rows` is its length and `columns` 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=500)
    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    transposed: bool = False


class Claim(BaseModel):
    """What a party opens to an arbiter, and to nobody else: who has it can find the marks, and take them out.

    `bits` is a text of 0 and 1. The carrier, and where it sits, follow from the job and the base; they are in the hash
    as well, so that an arbiter needs neither. The log says, beside the key, where the bits are; a claim of another form
    than `own-v2` can be read, so that it is rejected with the reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    form: str = Field(BOUND, pattern=r"^[a-z0-9-]{1,16}$")
    party: str
    job_digest: str = Field(pattern=_HEX)
    base_digest: str = Field(pattern=_HEX)
    carrier: Carrier
    sites: tuple[MarkSite, ...] = Field(strict=False)
    key_seed: str = Field(pattern=_HEX, repr=False)
    bits: str = Field(pattern=r"^[01]*$", repr=False)
    triggers: tuple[Trigger, ...] = Field(default=(), strict=False, repr=False)
    threshold: float = Field(gt=0, le=0.01)
    salt: str = Field(pattern=_HEX, repr=False)

    @field_validator("sites")
    @classmethod
    def _sites_differ(cls, sites: tuple[MarkSite, ...]) -> tuple[MarkSite, ...]:
        # A weight that is named twice would count twice.
        if len({site.name for site in sites}) < len(sites):
            raise ValueError("a site is named twice")
        return sites

    def canonical(self) -> bytes:
        """Return the bytes that are hashed after the form: the other fields as JSON, in one spelling."""
        fields = self.model_dump(mode="json", exclude={"form"})
        return json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()

    def commitment(self) -> str:
        """Return the hash by which the party commits to this claim, SHA-256, hex."""
        return hashlib.sha256(f"fedllm {self.form}\0".encode() + self.canonical()).hexdigest()

    def signs(self) -> list[int]:
        """Return the bits as +1 and -1."""
        return [1 if bit == "1" else -1 for bit in self.bits]


def new_bits(num_bits: int) -> str:
    """Return random bits as a text of 0 and 1, from the system's generator.

    Args:
        num_bits: How many.
    """
    return "".join(secrets.choice("01") for _ in range(num_bits))


def new_secret() -> str:
    """Return 32 random bytes, hex: a key seed, or a salt."""
    return secrets.token_hex(32)


def save_claim(claim: Claim, path: Path) -> None:
    """Write a claim into a file that only its owner can read. No file is ever overwritten.

    Args:
        claim: The claim.
        path: A file that does not exist yet.

    Raises:
        IdentityError: `KEY_EXISTS`.
        ResourceError: `DISK_FULL`.
    """
    text = json.dumps(claim.model_dump(mode="json"), ensure_ascii=False, indent=1) + "\n"
    fix = "use the claim that is there; a job that was committed to keeps its claim"
    save_private(text.encode(), path, fix=fix)


def stamp_file(claim_file: Path) -> Path:
    """Return where the time stamp on a claim's commitment is, beside the claim.

    Args:
        claim_file: The claim's file.
    """
    return claim_file.with_name(claim_file.name.removesuffix(CLAIM_SUFFIX) + _STAMP_SUFFIX)


def find_claim(path: Path) -> Path:
    """Return the file of a claim: the one that is named, or the only one in a folder.

    Args:
        path: A file, or a party's folder of claims.

    Raises:
        ConfigError: `FILE_NOT_FOUND`, or `BAD_VALUE` where a folder has several.
    """
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*{CLAIM_SUFFIX}"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(one.name for one in found[:5])
        raise ConfigError("BAD_VALUE", f"{len(found)} claims: {names}", where=str(path), fix="name one of the files")
    fix = "`fedllm ownership commit` writes claims into the party's folder"
    raise ConfigError("FILE_NOT_FOUND", "no claim is in this folder", where=str(path), fix=fix)


def load_claim(path: Path) -> Claim:
    """Return the claim in a file.

    Args:
        path: From `save_claim`; readable by its owner alone. A folder with one claim stands for it.

    Raises:
        IdentityError: `KEY_EXPOSED`, or `BAD_KEY` where it cannot be read.
        ConfigError: `BAD_VALUE`, it is no claim; `FILE_NOT_FOUND`.
    """
    path = find_claim(path)
    data = read_private(path, fix="name a claim that `fedllm ownership commit` wrote", max_bytes=_MAX_CLAIM_BYTES)
    try:
        return Claim.model_validate_json(data)
    except ValidationError as error:
        # What the library says may quote the file.
        wrong = ", ".join(sorted({str(part["loc"][0]) if part["loc"] else "file" for part in error.errors()}))
        fix = "restore it from a backup: a changed claim does not open its commitment"
        raise ConfigError("BAD_VALUE", f"no claim: {wrong[:200]}", where=str(path), fix=fix) from None
