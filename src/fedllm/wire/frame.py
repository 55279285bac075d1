"""Payload <-> bytes: a signed JSON header of bounded size, and one safetensors blob beside it. No pickle."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any

import torch
from pydantic import ValidationError

from fedllm.errors import PayloadError
from fedllm.wire.blob import Blob, Buffer, MemoryBlob, in_memory, parts_of
from fedllm.wire.patch import Patched
from fedllm.wire.payload import Envelope, Manifest, Payload, plain_fields
from fedllm.wire.stored import Entry, StoredTensors, magnitude, parse_json, scan, specs_of, table_of

_MAGIC = b"FLM2"
_PREFIX = struct.Struct("<4sIH")
MAX_HEADER_BYTES = 16 * 2**20
_MAX_SIGNATURE_BYTES = 2048
_MAX_BLOB_BYTES = 2**48

Keep = Callable[[Iterable[Buffer]], Blob]


@dataclass(frozen=True)
class Parcel:
    """A message as it travels: its head, and its tensors if they come along."""

    head: bytes
    blob: Blob | None = None

    @property
    def num_bytes(self) -> int:
        """Length of both."""
        return len(self.head) + (self.blob.size if self.blob else 0)


@dataclass(frozen=True)
class Frame:
    """A message taken apart. Its tensors are named by digest and size, whether `blob` came along or not.

    `patch` is a change that leads to them from the blob with the digest `patch_of`: what travels in their place.
    `text` and `signature` are what was signed and by which signature; empty in a message that is still to be sent.
    """

    envelope: Envelope
    kind: str
    fields: dict[str, Any]
    blob_digest: str = ""
    blob_size: int = 0
    blob: Blob | None = None
    patch_of: str = ""
    patch_digest: str = ""
    patch_size: int = 0
    patch: Blob | None = None
    text: bytes = b""
    signature: bytes = b""

    @property
    def travels(self) -> tuple[str, int]:
        """Digest and size of what travels: the change, where there is one, or the tensors."""
        return (self.patch_digest, self.patch_size) if self.patch_of else (self.blob_digest, self.blob_size)

    def without_patch(self) -> Frame:
        """Return the message with its tensors as they are."""
        return replace(self, patch_of="", patch_digest="", patch_size=0, patch=None)


def encode(payload: Payload, envelope: Envelope, *, keep: Keep = in_memory) -> Frame:
    """Return the frame of a payload; tensors go to the CPU, and are copied if `keep` says so.

    Args:
        payload: What to send.
        envelope: Whose it is.
        keep: Makes the blob out of its pieces.
    """
    tensors = {
        f"{field}/{name}": tensor
        for field in payload.tensor_fields()
        for name, tensor in getattr(payload, field).items()
    }
    frame = Frame(envelope, type(payload).__name__, plain_fields(payload))
    if not tensors:
        return frame
    blob = keep(parts_of(tensors))
    frame = replace(frame, blob_digest=blob.digest, blob_size=blob.size, blob=blob)
    return _with_patch(frame, payload, keep)


def _with_patch(frame: Frame, payload: Payload, keep: Keep) -> Frame:
    fields = [field for field in payload.tensor_fields() if getattr(payload, field)]
    value = getattr(payload, fields[0])
    # A change leads to a whole blob, so there must be nothing else in it.
    if len(fields) > 1 or not isinstance(value, Patched):
        return frame
    patch = keep(parts_of({f"{fields[0]}/{name}": tensor for name, tensor in value.change.items()}))
    return replace(frame, patch_of=value.of, patch_digest=patch.digest, patch_size=patch.size, patch=patch)


def pack(frame: Frame, *, omit_blob: bool = False, sign: Callable[[bytes], bytes] | None = None) -> Parcel:
    """Return a frame as it travels.

    Args:
        frame: The message. Where it has a change to its tensors, that travels in their place.
        omit_blob: Name the tensors only, because the receiver holds them already.
        sign: Returns the sender's signature of the header; unsigned by default.
    """
    header: dict[str, Any] = {
        "envelope": frame.envelope.model_dump(),
        "kind": frame.kind,
        "fields": frame.fields,
        "blob": {"sha256": frame.blob_digest, "size": frame.blob_size},
    }
    if frame.patch_of and not omit_blob:
        header["patch"] = {"of": frame.patch_of, "sha256": frame.patch_digest, "size": frame.patch_size}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    signature = sign(text) if sign else b""
    head = b"".join([_PREFIX.pack(_MAGIC, len(text), len(signature)), signature, text])
    return Parcel(head, None if omit_blob else frame.patch or frame.blob)


def join(parcel: Parcel) -> bytes:
    """Return a parcel as bytes in one piece, for small ones.

    Args:
        parcel: The message.
    """
    data = bytearray(parcel.num_bytes)
    view = memoryview(data)
    view[: len(parcel.head)] = parcel.head
    if parcel.blob:
        parcel.blob.read_into(0, view[len(parcel.head) :])
    return bytes(data)


def split(data: Buffer) -> Parcel:
    """Return the parcel that `join` made one piece of; what follows the head are its tensors.

    Args:
        data: The bytes received.

    Raises:
        PayloadError: `PAYLOAD_REFUSED`, there is no head.
    """
    _, end = _ends(data)
    if end > len(data):
        raise _refuse("message is shorter than its header")
    rest = memoryview(data)[end:]
    return Parcel(bytes(data[:end]), MemoryBlob(rest) if rest else None)


def _refuse(what: str, *, where: str = "") -> PayloadError:
    return PayloadError("PAYLOAD_REFUSED", what, where=where, fix="check that all parties run the same version")


def read_head(handle: IO[bytes]) -> bytes:
    """Return the head that a file goes on with; the file then stands at the first byte after it.

    Args:
        handle: An open file.

    Raises:
        PayloadError: `PAYLOAD_REFUSED`, no whole head is there.
    """
    prefix = handle.read(_PREFIX.size)
    _, end = _ends(prefix)
    head = prefix + handle.read(end - len(prefix))
    if len(head) < end:
        raise _refuse("message is shorter than its header")
    return head


def _ends(data: Buffer) -> tuple[int, int]:
    """Return where the header begins and where it ends, as the prefix says."""
    if len(data) < _PREFIX.size:
        raise _refuse("message is shorter than its prefix")
    magic, text_bytes, signature_bytes = _PREFIX.unpack_from(data)
    if magic != _MAGIC or text_bytes > MAX_HEADER_BYTES or signature_bytes > _MAX_SIGNATURE_BYTES:
        raise _refuse("message has no valid prefix")
    start = _PREFIX.size + signature_bytes
    return start, start + text_bytes


def unpack(parcel: Parcel, *, max_bytes: int) -> Frame:
    """Return the frame in a parcel. Tensors that came along are compared with their digest.

    Args:
        parcel: The message received.
        max_bytes: Longest message accepted, tensors included whether they came along or are only announced.

    Raises:
        PayloadError: `PAYLOAD_REFUSED`, the message is malformed or too long.
    """
    if parcel.num_bytes > max_bytes:
        raise _refuse(f"message of {parcel.num_bytes} bytes, at most {max_bytes} allowed")
    start, end = _ends(parcel.head)
    if end != len(parcel.head):
        raise _refuse("message is not as long as its prefix says")
    text = parcel.head[start:end]
    frame = _parsed(text)
    if max(frame.blob_size, frame.patch_size) > max_bytes - len(parcel.head):
        raise _refuse(f"tensors of {frame.blob_size} bytes, at most {max_bytes} allowed", where=frame.envelope.sender)
    if parcel.blob and (parcel.blob.digest, parcel.blob.size) != frame.travels:
        raise _refuse("tensors do not match their digest", where=frame.envelope.sender)
    frame = replace(frame, patch=parcel.blob) if frame.patch_of else replace(frame, blob=parcel.blob)
    return replace(frame, text=text, signature=parcel.head[_PREFIX.size : start])


def _parsed(text: bytes) -> Frame:
    try:
        header = parse_json(text)
    except ValueError:
        raise _refuse("header is not JSON") from None
    if not isinstance(header, dict) or header.keys() - {"patch"} != {"envelope", "kind", "fields", "blob"}:
        raise _refuse("header has other keys than it should")
    try:
        envelope = Envelope.model_validate(header["envelope"])
    except ValidationError:
        raise _refuse("envelope is malformed") from None
    if not isinstance(header["kind"], str) or not isinstance(header["fields"], dict):
        raise _refuse("header is malformed", where=envelope.sender)
    frame = Frame(envelope, header["kind"], header["fields"], *_blob_note(header["blob"], envelope.sender))
    return _with_patch_note(frame, header["patch"]) if "patch" in header else frame


def _with_patch_note(frame: Frame, note: Any) -> Frame:
    sender = frame.envelope.sender
    if not isinstance(note, dict) or note.keys() != {"of", "sha256", "size"}:
        raise _refuse("header does not describe its tensors", where=sender)
    of, _ = _blob_note({"sha256": note["of"], "size": 1}, sender)
    digest, size = _blob_note({"sha256": note["sha256"], "size": note["size"]}, sender)
    if not digest or not frame.blob_digest:
        raise _refuse("header does not describe its tensors", where=sender)
    return replace(frame, patch_of=of, patch_digest=digest, patch_size=size)


def _blob_note(note: Any, sender: str) -> tuple[str, int]:
    if not isinstance(note, dict) or note.keys() != {"sha256", "size"}:
        raise _refuse("header does not describe its tensors", where=sender)
    digest, size = note["sha256"], note["size"]
    # Either both say that there are no tensors, or neither does.
    is_digest = isinstance(digest, str) and (
        not digest or (len(digest) == 64 and set(digest) <= set("0123456789abcdef"))
    )
    if not is_digest or type(size) is not int or not 0 <= size <= _MAX_BLOB_BYTES or bool(size) != bool(digest):
        raise _refuse("header does not describe its tensors", where=sender)
    return digest, size


def with_blob(frame: Frame, held: Mapping[str, Blob]) -> Frame:
    """Return the frame with the tensors that it refers to.

    Args:
        frame: A received frame.
        held: Blobs by digest that this receiver holds.

    Raises:
        PayloadError: `BLOB_MISSING`, the tensors are not held here.
    """
    if frame.blob or not frame.blob_digest:
        return frame
    if frame.blob_digest not in held:
        raise PayloadError("BLOB_MISSING", "the tensors that the message refers to are not held here")
    return replace(frame, blob=held[frame.blob_digest])


def decode(frame: Frame, kinds: Mapping[str, type[Payload]]) -> Payload:
    """Return the payload in a frame. Only the given kinds are known; each tensor must be finite.

    Its tensors are read from the frame's blob one by one, when they are looked at.

    Args:
        frame: The message, whole.
        kinds: Payload classes by name: the closed schema of the conversation.

    Raises:
        PayloadError: `PAYLOAD_REFUSED` or `NONFINITE`, naming the sender.
    """
    sender = frame.envelope.sender
    cls = kinds.get(frame.kind)
    if cls is None:
        raise _refuse(f"message of unknown kind {frame.kind[:40]!r}", where=sender)
    if frame.fields.keys() & set(cls.tensor_fields()):
        raise _refuse("a tensor field is sent as a plain field", where=sender)
    if frame.blob_digest and not frame.blob:
        raise _refuse("its tensors did not arrive", where=sender)
    tensors: Mapping[str, Mapping[str, torch.Tensor]] = {field: {} for field in cls.tensor_fields()}
    if frame.blob:
        tensors = _stored(frame.blob, cls, sender)
    try:
        return cls.model_validate({**frame.fields, **tensors})
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise _refuse(f"{frame.kind} has invalid fields: {fields[:200]}", where=sender) from None


def _stored(blob: Blob, cls: type[Payload], sender: str) -> dict[str, StoredTensors]:
    try:
        table = table_of(blob)
    except ValueError:
        raise _refuse("tensors are not in the safetensors format and dtypes that may travel", where=sender) from None
    entries: dict[str, dict[str, Entry]] = {field: {} for field in cls.tensor_fields()}
    for key in sorted(table):
        field, _, name = key.partition("/")
        if field not in entries:
            raise _refuse(f"tensor {key[:80]!r} belongs to no field of {cls.__name__}", where=sender)
        entries[field][name] = table[key]
    largest, bad = scan(blob, table)
    if bad:
        raise _bad_value(bad.partition("/")[2], sender)
    return {field: StoredTensors(blob, found, largest.get(field, 0.0)) for field, found in entries.items()}


def _bad_value(name: str, sender: str) -> PayloadError:
    return PayloadError("NONFINITE", f"tensor {name[:200]!r} holds NaN or infinity", where=sender)


def check_finite(tensors: Mapping[str, torch.Tensor], *, sender: str) -> None:
    """Check that all tensors hold finite numbers, as every receiver will.

    Args:
        tensors: Named tensors.
        sender: Whose they are, for the error.

    Raises:
        PayloadError: `NONFINITE`, naming the tensor.
    """
    for name, tensor in tensors.items():
        if not math.isfinite(magnitude(tensor)):
            raise _bad_value(name, sender)


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
    specs = specs_of(tensors)
    for name, spec in expected.items():
        found = specs[name]
        if (found.dtype, found.shape) != (spec.dtype, spec.shape):
            raise _refuse(
                f"tensor {name!r} is {found.dtype}{found.shape}, expected {spec.dtype}{spec.shape}",
                where=sender,
            )
