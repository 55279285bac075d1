"""The messages of a secure sum, which stand around the request whose answers are summed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedllm.privacy.secure_sum import Keys
from fedllm.wire.payload import Payload, TensorMap

# Beside the tensors of an answer: its weight and its counts.
COUNTS = "#counts"
_Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128,2048}$")]
_Sealed = Annotated[str, Field(pattern=r"^[0-9a-f]{16,2048}$")]
_Share = Annotated[str, Field(pattern=r"^[0-9a-f]{132}$")]
_What = Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")]


class ShownKeys(BaseModel):
    """A party's public keys as they travel; see `fedllm.privacy.secure_sum.Keys`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mask_key: _Hex32
    seal_key: _Hex32
    seed_digest: _Hex32
    signature: _Signature

    def keys(self) -> Keys:
        """Return them as the sum knows them."""
        return Keys(self.mask_key, self.seal_key, self.seed_digest, self.signature)


class ShowKeys(Payload):
    """Server -> parties: a sum of this begins; make keys for it."""

    what: _What


class KeysShown(Payload):
    """Party -> server: its keys."""

    keys: ShownKeys


class SealShares(Payload):
    """Server -> parties: all that take part, with their keys."""

    what: _What
    keys: dict[str, ShownKeys]


class SharesSealed(Payload):
    """Party -> server: its shares for each other party, sealed for it."""

    sealed: dict[str, _Sealed]


class TakeShares(Payload):
    """Server -> a party: what the others sealed for it. The request itself comes next."""

    what: _What
    sealed: dict[str, _Sealed]


class SharesTaken(Payload):
    """Party -> server: it can mask now."""


class Masked(Payload):
    """Party -> server: its masked summand. `names` are those of the counts, which are masked beside the tensors."""

    names: list[Annotated[str, Field(pattern=r"^[a-z0-9_/-]{1,80}$")]] = Field(max_length=1100)
    tensors: TensorMap


class AgreeSum(Payload):
    """Server -> parties: whose masked summands arrived."""

    what: _What
    survivors: list[str]


class SumAgreed(Payload):
    """Party -> server: its signature of that, and of what it was asked."""

    signature: _Signature


class OpenSum(Payload):
    """Server -> parties: what the others signed."""

    what: _What
    signatures: dict[str, _Signature]


class SumOpened(Payload):
    """Party -> server: its shares of the seeds of those in the sum, and of the keys of those who are missing."""

    seeds: dict[str, _Share]
    keys: dict[str, _Share]


SUM_REQUESTS: tuple[type[Payload], ...] = (ShowKeys, SealShares, TakeShares, AgreeSum, OpenSum)
SUM_REPLIES: tuple[type[Payload], ...] = (KeysShown, SharesSealed, SharesTaken, Masked, SumAgreed, SumOpened)
SUM_KINDS = {cls.__name__: cls for cls in (*SUM_REQUESTS, *SUM_REPLIES)}


def shown(keys: Keys) -> ShownKeys:
    """Return a party's keys as they travel.

    Args:
        keys: The keys.
    """
    return ShownKeys(
        mask_key=keys.mask_key, seal_key=keys.seal_key, seed_digest=keys.seed_digest, signature=keys.signature
    )


def known(keys: Mapping[str, ShownKeys]) -> dict[str, Keys]:
    """Return the parties' keys as the sum knows them.

    Args:
        keys: As they travelled.
    """
    return {name: found.keys() for name, found in keys.items()}


def context_of(job_digest: str, run_id: str, number: int, what: str) -> bytes:
    """Return what names a sum.

    Args:
        job_digest: The job.
        run_id: The run.
        number: The round.
        what: What is summed in it.
    """
    return json.dumps([job_digest, run_id, number, what]).encode()
