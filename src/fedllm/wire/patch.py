"""Tensors as a change to those sent before: encoded, and applied to the same bits by whoever holds these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedllm.errors import PayloadError
from fedllm.variants import with_own
from fedllm.wire.blob import Blob, MemoryBlob, in_memory, parts_of
from fedllm.wire.codecs import Codec, CodecSettings
from fedllm.wire.payload import Tensors, manifest_of
from fedllm.wire.stored import StoredTensors, table_of

_DEFAULTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {},
    "int8": {"block_size": 64},
    "int4": {"block_size": 64},
}


class DownSettings(BaseModel):
    """In which form the global adapter's change travels down. What a codec loses is sent with the next one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: Literal["fp32", "bf16", "int8", "int4"] = Field(
        "fp32", description="The codec; fp32 sends the adapter itself."
    )
    block_size: int | None = Field(None, ge=8, le=4096, description="int8, int4: values that share a scale, 64.")

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_codec(cls, values: Any) -> Any:
        return with_own(values, cls.model_fields, key="name", default="fp32", variants=_DEFAULTS)

    @property
    def codec(self) -> Codec:
        """The codec; it rounds to the nearest."""
        given = self.model_dump(exclude_none=True)
        return Codec(CodecSettings.model_validate(given if self.name == "fp32" else given | {"error_feedback": True}))


@dataclass(frozen=True, eq=False)
class Patched(Mapping[str, torch.Tensor]):
    """Tensors, and how to make them from others: `change`, encoded, to those whose blob has the digest `of`."""

    whole: Tensors
    change: Tensors
    of: str

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole)

    def __len__(self) -> int:
        return len(self.whole)


@dataclass(frozen=True)
class Sent:
    """What all parties hold next, the encoded change that leads to it, and what the codec still owes."""

    tensors: Tensors
    change: Tensors
    lost: Tensors


def next_sent(
    before: Tensors, wanted: Mapping[str, torch.Tensor], lost: Tensors, *, names: Iterable[str], codec: Codec
) -> Sent:
    """Return what is sent in place of the wanted tensors, and what of them is owed.

    The change is rounded to the nearest, and what was lost before is a part of it: sum of all that was sent + what is
    owed = sum of all that was wanted (error feedback at the server, Tang et al. 2019, arXiv:1905.05957, algorithm 1).

    Args:
        before: What all parties hold.
        wanted: What the server's step made of it.
        lost: What was owed so far.
        names: The tensors that changed.
        codec: Of the change.
    """
    goals = {name: wanted[name] + lost[name] if name in lost else wanted[name] for name in names}
    change = codec.encode({name: goal - before[name] for name, goal in goals.items()}, seed=0, party="", number=0)
    arrived = _changed(before, change, names=list(goals), codec=codec)
    return Sent(before | arrived, change, lost | {name: goal - arrived[name] for name, goal in goals.items()})


def _changed(
    before: Mapping[str, torch.Tensor], change: Mapping[str, torch.Tensor], *, names: list[str], codec: Codec
) -> Tensors:
    old = {name: before[name] for name in names}
    decoded = codec.decode(change, manifest_of(old), seed=0, number=0)
    return {name: tensor + decoded[name] for name, tensor in old.items()}


def applied(old: Blob, patch: Blob, codec: Codec, *, digest: str) -> MemoryBlob:
    """Return the blob that a change leads to.

    Args:
        old: The blob that it was made for.
        patch: The change, encoded.
        codec: Of the change.
        digest: Of the blob to come out.

    Raises:
        PayloadError: `BLOB_MISSING`, the change does not lead there; the whole must be sent.
    """
    try:
        before, change = (StoredTensors(blob, table_of(blob)) for blob in (old, patch))
        specs = {name: spec for name, spec in before.specs.items() if codec.manifest({name: spec}).keys() & {*change}}
        if codec.manifest(specs) == change.specs:
            found = in_memory(parts_of({**before, **_changed(before, change, names=list(specs), codec=codec)}))
            if found.digest == digest:
                return found
    except (OSError, ValueError):
        pass
    raise PayloadError("BLOB_MISSING", "the change that was sent does not lead to the tensors that are meant")
