"""Payload <-> bytes: a magic word, a JSON header of bounded size, and one safetensors blob. No pickle."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from fedllm.errors import PayloadError
from fedllm.wire.payload import Envelope, Manifest, Payload, TensorSpec, plain_fields

_MAGIC = b"FLM1"
_PREFIX = struct.Struct("<4sI")
MAX_HEADER_BYTES = 16 * 2**20
# What may travel, in safetensors' words. Other dtypes have no use here, and not all of them can be checked or summed.
_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}


@dataclass(frozen=True)
class Frame:
    """A message taken apart: `fields` is plain, `blob` is safetensors bytes named by its SHA-256."""

    envelope: Envelope
    kind: str
    fields: dict[str, Any]
    blob: bytes
    blob_digest: str
    blob_sent: bool = True


def encode(payload: Payload, envelope: Envelope) -> Frame:
    """Return the frame of a payload; tensors go to the CPU and are copied.

    Args:
        payload: What to send.
        envelope: Whose it is.
    """
    tensors = {
        f"{field}/{name}": tensor.detach().to("cpu").contiguous()
        for field in payload.tensor_fields()
        for name, tensor in getattr(payload, field).items()
    }
    blob = save_safetensors(tensors) if tensors else b""
    digest = hashlib.sha256(blob).hexdigest() if blob else ""
    return Frame(envelope, type(payload).__name__, plain_fields(payload), blob, digest)


def to_bytes(frame: Frame, *, omit_blob: bool = False) -> bytes:
    """Return the bytes that travel.

    Args:
        frame: The message.
        omit_blob: Send only the blob's digest, because the receiver holds the blob already.
    """
    header = {
        "envelope": frame.envelope.model_dump(),
        "kind": frame.kind,
        "fields": frame.fields,
        "blob": {"sha256": frame.blob_digest, "sent": not omit_blob},
    }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    return b"".join([_PREFIX.pack(_MAGIC, len(text)), text, b"" if omit_blob else frame.blob])


def _refuse(what: str, *, where: str = "") -> PayloadError:
    return PayloadError("PAYLOAD_REFUSED", what, where=where, fix="check that all parties run the same version")


def _parse_header(data: bytes, *, max_bytes: int) -> tuple[dict[str, Any], int]:
    if len(data) > max_bytes:
        raise _refuse(f"message of {len(data)} bytes, at most {max_bytes} allowed")
    if len(data) < _PREFIX.size:
        raise _refuse("message is shorter than its prefix")
    magic, header_bytes = _PREFIX.unpack_from(data)
    end = _PREFIX.size + header_bytes
    if magic != _MAGIC or header_bytes > MAX_HEADER_BYTES or end > len(data):
        raise _refuse("message has no valid prefix")
    try:
        header = json.loads(data[_PREFIX.size : end], object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        raise _refuse("header is not JSON") from None
    if not isinstance(header, dict) or set(header) != {"envelope", "kind", "fields", "blob"}:
        raise _refuse("header has other keys than it should")
    return header, end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _blob_note(header: dict[str, Any], tail: bytes) -> tuple[str, bool]:
    note = header["blob"]
    if not isinstance(note, dict) or set(note) != {"sha256", "sent"} or not isinstance(note["sha256"], str):
        raise _refuse("header does not describe its tensors")
    digest, sent = note["sha256"], note["sent"]
    if not isinstance(sent, bool):
        raise _refuse("header does not describe its tensors")
    if not sent and tail:
        raise _refuse("tensors follow a header that announces none")
    if sent and (hashlib.sha256(tail).hexdigest() if tail else "") != digest:
        raise _refuse("tensors do not match their digest")
    return digest, sent


def from_bytes(data: bytes, *, max_bytes: int) -> Frame:
    """Return the frame in a message, its blob's digest checked if it was sent along.

    Args:
        data: The bytes received.
        max_bytes: Longest message accepted.

    Raises:
        PayloadError: `PAYLOAD_REFUSED`, the bytes are malformed or too many.
    """
    header, end = _parse_header(data, max_bytes=max_bytes)
    try:
        envelope = Envelope.model_validate(header["envelope"])
    except ValidationError:
        raise _refuse("envelope is malformed") from None
    if not isinstance(header["kind"], str) or not isinstance(header["fields"], dict):
        raise _refuse("header is malformed", where=envelope.sender)
    tail = data[end:]
    digest, sent = _blob_note(header, tail)
    return Frame(envelope, header["kind"], header["fields"], tail, digest, sent)


def with_blob(frame: Frame, held: Mapping[str, bytes]) -> Frame:
    """Return the frame with the tensors that it refers to.

    Args:
        frame: A received frame.
        held: Blobs by digest that this receiver holds from earlier messages.

    Raises:
        PayloadError: `BLOB_MISSING`, the tensors are not held here.
    """
    if frame.blob_sent or not frame.blob_digest:
        return frame
    if frame.blob_digest not in held:
        raise PayloadError("BLOB_MISSING", "the tensors that the message refers to are not held here")
    return replace(frame, blob=held[frame.blob_digest], blob_sent=True)


def decode(frame: Frame, kinds: Mapping[str, type[Payload]]) -> Payload:
    """Return the payload in a frame. Only the given kinds are known; each tensor must be finite.

    Args:
        frame: The message.
        kinds: Payload classes by name: the closed schema of the conversation.

    Raises:
        PayloadError: `PAYLOAD_REFUSED` or `NONFINITE`, naming the sender.
    """
    sender = frame.envelope.sender
    cls = kinds.get(frame.kind)
    if cls is None:
        raise _refuse(f"message of unknown kind {frame.kind[:40]!r}", where=sender)
    tensors: dict[str, dict[str, torch.Tensor]] = {field: {} for field in cls.tensor_fields()}
    try:
        for key, tensor in _load_tensors(frame.blob).items():
            field, _, name = key.partition("/")
            if field not in tensors:
                raise _refuse(f"tensor {key[:80]!r} belongs to no field of {frame.kind}", where=sender)
            _check_finite(tensor, name=name, sender=sender)
            tensors[field][name] = tensor
        if frame.fields.keys() & tensors.keys():
            raise _refuse("a tensor field is sent as a plain field", where=sender)
        return cls.model_validate({**frame.fields, **tensors})
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise _refuse(f"{frame.kind} has invalid fields: {fields[:200]}", where=sender) from None
    except (SafetensorError, ValueError, RecursionError):
        raise _refuse("tensors are not in the safetensors format and dtypes that may travel", where=sender) from None


def _load_tensors(blob: bytes) -> dict[str, torch.Tensor]:
    # The header is read here first: the library lets a name stand twice, and fails on some dtypes.
    if not blob:
        return {}
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")], object_pairs_hook=_without_duplicates)
    entries = [entry for name, entry in header.items() if name != "__metadata__"] if isinstance(header, dict) else []
    if not all(isinstance(entry, dict) and entry.get("dtype") in _DTYPES for entry in entries):
        raise ValueError("a dtype that may not travel")
    tensors: dict[str, torch.Tensor] = load_safetensors(blob)
    # The library's order differs from call to call, and sums of floats over a dict follow it.
    return dict(sorted(tensors.items()))


def check_finite(tensors: Mapping[str, torch.Tensor], *, sender: str) -> None:
    """Check that all tensors hold finite numbers, as every receiver will.

    Args:
        tensors: Named tensors.
        sender: Whose they are, for the error.

    Raises:
        PayloadError: `NONFINITE`, naming the tensor.
    """
    for name, tensor in tensors.items():
        _check_finite(tensor, name=name, sender=sender)


def _check_finite(tensor: torch.Tensor, *, name: str, sender: str) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise PayloadError("NONFINITE", f"tensor {name!r} holds NaN or infinity", where=sender)


def check_manifest(tensors: Mapping[str, torch.Tensor], expected: Manifest, *, sender: str) -> None:
    """Check that names, dtypes and shapes are those agreed at the start.

    Args:
        tensors: What was received.
        expected: What was agreed.
        sender: Who sent it, for the error.

    Raises:
        PayloadError: `PAYLOAD_REFUSED`, naming the first tensor that differs.
    """
    for name in sorted(set(tensors) ^ set(expected)):
        state = "missing" if name in expected else "not expected"
        raise _refuse(f"tensor {name!r} is {state}", where=sender)
    for name, spec in expected.items():
        if (found := TensorSpec.of(tensors[name])) != spec:
            raise _refuse(
                f"tensor {name!r} is {found.dtype}{found.shape}, expected {spec.dtype}{spec.shape}",
                where=sender,
            )
