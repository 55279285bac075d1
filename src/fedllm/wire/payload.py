"""What may travel: frozen payloads of plain fields and named tensors, and the envelope around each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, SkipValidation

Tensors = dict[str, torch.Tensor]
# A payload's tensors: a dict at the sender; at the receiver they may still lie in a file and be read one by one.
TensorMap = Annotated[Mapping[str, torch.Tensor], SkipValidation]
_ROLE = r"^[a-z0-9][a-z0-9_-]{0,63}$"


class Payload(BaseModel):
    """A message's content. A subclass declares plain fields (finite numbers) and fields of type `TensorMap`.

    `commits` marks a request after which the party saves its own state under the request's round.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )
    commits: ClassVar[bool] = False

    @classmethod
    def tensor_fields(cls) -> tuple[str, ...]:
        """Return the names of the fields that hold tensors."""
        return tuple(name for name, field in cls.model_fields.items() if field.annotation == Mapping[str, torch.Tensor])


class Failure(Payload):
    """A party could not do what was asked. The exception's text stays there."""

    code: str = Field(pattern=r"^[A-Z0-9_]{1,40}$")


class Envelope(BaseModel):
    """Whose message this is and where in which run it belongs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    job_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    run_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    round: int = Field(ge=0)
    sequence: int = Field(
        ge=0, lt=2**64, description="The server's start, times 2**32, plus the number of the exchange since then."
    )
    sender: str = Field(pattern=_ROLE)
    recipient: str = Field(pattern=_ROLE)

    def reply(self) -> Envelope:
        """Return the envelope of the answer to this message."""
        return self.model_copy(update={"sender": self.recipient, "recipient": self.sender})


class TensorSpec(BaseModel):
    """Dtype and shape of one tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: str
    shape: list[int]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """Return the spec of a tensor."""
        return cls(dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape))

    @property
    def num_bytes(self) -> int:
        """Size of such a tensor, in bytes."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * dtype.itemsize

    def zeros(self) -> torch.Tensor:
        """Return a tensor of zeros of this dtype and shape."""
        return torch.zeros(self.shape, dtype=getattr(torch, self.dtype))


Manifest = dict[str, TensorSpec]


def manifest_of(tensors: Mapping[str, torch.Tensor]) -> Manifest:
    """Return name -> dtype and shape, in name order.

    Args:
        tensors: The named tensors.
    """
    return {name: TensorSpec.of(tensors[name]) for name in sorted(tensors)}


def plain_fields(payload: Payload) -> dict[str, Any]:
    """Return the payload's fields that are not tensors, ready for JSON.

    Args:
        payload: The payload.
    """
    return payload.model_dump(mode="json", exclude=set(payload.tensor_fields()))
