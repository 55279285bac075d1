"""Payload <-> bytes: round trips, and what is refused on receipt."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors
from tiny import bits

from fedllm.errors import PayloadError
from fedllm.wire.blob import MemoryBlob, whole
from fedllm.wire.frame import Frame, check_manifest, decode, encode, join, pack, split, unpack, with_blob
from fedllm.wire.payload import Envelope, Failure, Payload, TensorMap, Tensors, TensorSpec, manifest_of

ROOM = 2**30


class Sample(Payload):
    """A payload of every kind of field that scenarios use."""

    number: int
    share: float
    words: list[str]
    counts: dict[str, float]
    first: TensorMap
    second: TensorMap


KINDS: dict[str, type[Payload]] = {"Sample": Sample, "Failure": Failure}
ENVELOPE = Envelope(job_digest="a" * 64, run_id="b" * 32, round=3, sequence=5, sender="north", recipient="server")


def sample(**changes: Any) -> Sample:
    values: dict[str, Any] = {
        "number": 1,
        "share": 0.5,
        "words": ["a"],
        "counts": {"x": 1.0},
        "first": {},
        "second": {},
    }
    return Sample(**values | changes)


def to_bytes(frame: Frame, *, omit_blob: bool = False) -> bytes:
    return join(pack(frame, omit_blob=omit_blob))


def from_bytes(data: bytes, *, max_bytes: int) -> Frame:
    return unpack(split(data), max_bytes=max_bytes)


def received(data: bytes) -> Payload:
    return decode(from_bytes(data, max_bytes=ROOM), KINDS)


PREFIX = struct.Struct("<4sIH")


def message(header: Any, blob: bytes = b"", *, magic: bytes = b"FLM2", signature: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return PREFIX.pack(magic, len(text), len(signature)) + signature + text + blob


def header_end_of(data: bytes) -> int:
    return PREFIX.size + int(PREFIX.unpack_from(data)[1])


def header_of(frame: Frame) -> dict[str, Any]:
    data = to_bytes(frame)
    header: dict[str, Any] = json.loads(data[PREFIX.size : header_end_of(data)])
    return header


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
tensors_strategy = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2**31)),
    max_size=4,
)


def tensor_of(spec: tuple[torch.dtype, list[int], int]) -> torch.Tensor:
    dtype, shape, seed = spec
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50
    return values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)


@given(
    first=tensors_strategy,
    second=tensors_strategy,
    number=st.integers(-(2**63), 2**63),
    share=st.floats(allow_nan=False, allow_infinity=False),
    words=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=3),
)
@settings(max_examples=60)
def test_every_payload_comes_back_bit_for_bit(first: Any, second: Any, number: int, share: float, words: Any) -> None:
    tensors = [{name: tensor_of(spec) for name, spec in specs.items()} for specs in (first, second)]
    sent = sample(number=number, share=share, words=words, first=tensors[0], second=tensors[1])
    frame = from_bytes(to_bytes(encode(sent, ENVELOPE)), max_bytes=ROOM)
    found = decode(frame, KINDS)
    assert frame.envelope == ENVELOPE
    assert isinstance(found, Sample)
    assert (found.number, found.share, found.words, found.counts) == (number, share, words, {"x": 1.0})
    for ours, theirs in zip(tensors, (found.first, found.second), strict=True):
        assert manifest_of(ours) == manifest_of(theirs)
        assert bits(ours) == bits(theirs)


def test_tensors_arrive_in_the_order_of_their_names() -> None:
    names = [f"layer{number}" for number in range(40)]
    found = received(to_bytes(encode(sample(first={name: torch.ones(2) for name in names}), ENVELOPE)))
    assert isinstance(found, Sample)
    assert list(found.first) == sorted(names)


def test_slices_and_transposes_are_sent_as_they_look() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    found = received(to_bytes(encode(sample(first={"t": whole.t(), "row": whole[1]}), ENVELOPE)))
    assert isinstance(found, Sample)
    assert found.first["t"].tolist() == whole.t().tolist()
    assert found.first["row"].tolist() == [4.0, 5.0, 6.0, 7.0]


def test_what_is_encoded_does_not_change_with_the_sender_s_tensor() -> None:
    tensor = torch.zeros(4)
    frame = encode(sample(first={"w": tensor}), ENVELOPE)
    tensor.fill_(9)
    found = received(to_bytes(frame))
    assert isinstance(found, Sample)
    assert found.first["w"].tolist() == [0.0] * 4


def test_every_truncation_is_refused() -> None:
    data = to_bytes(encode(sample(first={"w": torch.randn(3)}), ENVELOPE))
    for length in range(len(data)):
        with pytest.raises(PayloadError) as caught:
            received(data[:length])
        assert caught.value.code == "PAYLOAD_REFUSED"


def test_a_flipped_bit_is_refused_or_visible_in_the_envelope_or_fields() -> None:
    sent = sample(first={"w": torch.linspace(-1, 1, 16)})
    data = to_bytes(encode(sent, ENVELOPE))
    header_end = header_end_of(data)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        try:
            frame = from_bytes(bytes(flipped), max_bytes=ROOM)
            found = decode(frame, KINDS)
        except PayloadError:
            continue
        # The digest covers the tensors; a header with one letter changed is another valid message at most.
        assert position < header_end
        assert isinstance(found, Sample)
        assert bits(found.first) == bits(sent.first)


def test_a_message_over_the_cap_is_refused_before_it_is_parsed() -> None:
    data = to_bytes(encode(sample(), ENVELOPE))
    with pytest.raises(PayloadError, match="at most"):
        from_bytes(data, max_bytes=len(data) - 1)
    assert from_bytes(data, max_bytes=len(data)).kind == "Sample"


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda header: {name: value for name, value in header.items() if name != key}


def _with(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header | changes


@pytest.mark.parametrize(
    "change",
    [
        _without("envelope"),
        _without("blob"),
        _with(extra=1),
        _with(kind=7),
        _with(fields=[]),
        _with(envelope={}),
        _with(envelope="x"),
        _with(blob={"sha256": "", "size": "0"}),
        _with(blob={"sha256": "", "size": False}),
        _with(blob={"sha256": "", "size": 1}),
        _with(blob={"sha256": "", "size": -1}),
        _with(blob={"sha256": "", "size": 0.0}),
        _with(blob={"sha256": None, "size": 0}),
        _with(blob={"sha256": 7, "size": 8}),
        _with(blob={"sha256": "a" * 64, "size": 0}),
        _with(blob={"sha256": "a" * 63, "size": 8}),
        _with(blob={"sha256": "../" + "a" * 61, "size": 8}),
        _with(blob={"sha256": "A" * 64, "size": 8}),
        _with(blob={"sha256": "a" * 64, "size": 2**63}),
        _with(blob={"sha256": "", "size": 0, "more": 1}),
        _with(blob=[]),
        _with(patch=[]),
        _with(patch={"of": "a" * 64, "sha256": "b" * 64}),
        _with(patch={"of": "", "sha256": "b" * 64, "size": 8}),
        _with(patch={"of": "a" * 64, "sha256": "", "size": 0}),
        _with(patch={"of": "a" * 64, "sha256": "b" * 64, "size": 2**63}),
        _with(patch={"of": "a" * 64, "sha256": "b" * 64, "size": 8}, blob={"sha256": "", "size": 0}),
        lambda header: [header],
        lambda header: json.dumps(header).encode() + b"x",
        lambda header: b'{"kind": "Failure", ' + json.dumps(header).encode()[1:],
        lambda header: b"[" * 100_000,
        lambda header: b'{"a": ' + b"9" * 10_000 + b"}",
        lambda header: b"\xff\xfe",
        lambda header: b"",
    ],
)
def test_a_malformed_header_is_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    header = header_of(encode(sample(), ENVELOPE))
    received(message(header))
    with pytest.raises(PayloadError) as caught:
        received(message(change(header)))
    assert caught.value.code == "PAYLOAD_REFUSED"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("round", -1),
        ("round", 1.5),
        ("round", True),
        ("sequence", "1"),
        ("sender", ""),
        ("sender", "x" * 65),
        ("sender", "a\ud800"),
        ("sender", "../north"),
        ("recipient", "a\nb"),
        ("job_digest", "A" * 64),
        ("run_id", "b" * 31),
        ("extra", 1),
    ],
)
def test_a_malformed_envelope_is_refused(name: str, value: Any) -> None:
    header = header_of(encode(sample(), ENVELOPE))
    header["envelope"][name] = value
    with pytest.raises(PayloadError):
        received(message(header))


def test_another_magic_word_is_refused() -> None:
    header = header_of(encode(sample(), ENVELOPE))
    with pytest.raises(PayloadError, match="prefix"):
        received(message(header, magic=b"FLM1"))


def test_a_header_longer_than_the_message_is_refused() -> None:
    for text_bytes, signature_bytes in ((2**31, 0), (2, 2**16 - 1)):
        with pytest.raises(PayloadError, match="prefix"):
            received(PREFIX.pack(b"FLM2", text_bytes, signature_bytes) + b"{}")
    with pytest.raises(PayloadError, match="shorter"):
        received(PREFIX.pack(b"FLM2", 2, 1) + b"{}")


def test_an_unknown_kind_is_refused_and_the_sender_named() -> None:
    class Other(Payload):
        """Not part of the conversation."""

    with pytest.raises(PayloadError, match="unknown kind 'Other'") as caught:
        received(to_bytes(encode(Other(), ENVELOPE)))
    assert caught.value.where == "north"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number", 1.5),
        ("number", "1"),
        ("number", True),
        ("number", None),
        ("share", "0.5"),
        ("counts", {"x": None}),
        ("counts", {"x": "1"}),
        ("words", "abc"),
        ("unknown", 1),
        ("first", {}),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_and_the_sender_named(name: str, value: Any) -> None:
    header = header_of(encode(sample(), ENVELOPE))
    header["fields"][name] = value
    with pytest.raises(PayloadError) as caught:
        received(message(header))
    assert caught.value.code == "PAYLOAD_REFUSED"
    assert caught.value.where == "north"


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
@pytest.mark.parametrize("field", [b'"share":0.5', b'"x":1.0'])
def test_a_number_that_is_not_finite_is_refused_in_any_field(number: bytes, field: bytes) -> None:
    data = to_bytes(encode(sample(), ENVELOPE))
    text = data[PREFIX.size : header_end_of(data)]
    assert field in text
    with pytest.raises(PayloadError):
        received(message(text.replace(field, field.split(b":")[0] + b":" + number)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nan_and_infinity_in_one_element_are_refused_with_sender_and_tensor(value: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(5, 5, dtype=dtype)
    tensor[3, 2] = value
    with pytest.raises(PayloadError, match="'layer_w'") as caught:
        received(to_bytes(encode(sample(first={"layer_w": tensor}), ENVELOPE)))
    assert (caught.value.code, caught.value.where) == ("NONFINITE", "north")


def blob_message(blob: bytes) -> bytes:
    header = header_of(encode(sample(), ENVELOPE))
    header["blob"] = {"sha256": hashlib.sha256(blob).hexdigest(), "size": len(blob)}
    return message(header, blob)


def raw_safetensors(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "blob",
    [
        b"x",
        b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtins\x94.",
        raw_safetensors(b'{"first/w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"\0" * 4),
        raw_safetensors(b'{"first/w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}', b"\0" * 4),
        raw_safetensors(b'{"first/w":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}', b"\0" * 4),
        raw_safetensors(b'{"first/w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}', b"\0" * 4),
        raw_safetensors(b'{"first/w":{"dtype":"F8_E5M2","shape":[4],"data_offsets":[0,4]}}', b"\x7f" * 4),
        raw_safetensors(b'{"first/w":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}', b"\0" * 4),
        raw_safetensors(b'{"first/w":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}', b"\xff" * 8),
        raw_safetensors(b'{"first/w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 5),
        raw_safetensors(b'{"first/w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"\0" * 8),
        raw_safetensors(b'{"first/w":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', b"\0" * 4),
        raw_safetensors(b'{"first/w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}}', b"\0" * 4),
        raw_safetensors(b'{"first/w":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        raw_safetensors(
            b'{"first/w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b'"first/v":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            b"\0" * 8,
        ),
        raw_safetensors(b'{"__metadata__":{"a":"b"}}', b""),
        raw_safetensors(b"[" * 100_000, b""),
        struct.pack("<Q", 2**63) + b"{}",
        raw_safetensors(
            b'{"first/w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"first/w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"\0" * 4,
        ),
        save_safetensors({"third/w": torch.ones(1)}),
        save_safetensors({"w": torch.ones(1)}),
        save_safetensors({"number/w": torch.ones(1)}),
    ],
)
def test_tensors_in_another_format_or_of_no_field_are_refused(blob: bytes) -> None:
    with pytest.raises(PayloadError) as caught:
        received(blob_message(blob))
    assert caught.value.where == "north"


def test_no_message_holds_pickled_bytes() -> None:
    data = to_bytes(encode(sample(first={"w": torch.ones(3)}), ENVELOPE))
    header_end = header_end_of(data)
    json.loads(data[PREFIX.size : header_end])
    size = struct.unpack_from("<Q", data, header_end)[0]
    names = json.loads(data[header_end + 8 : header_end + 8 + size])
    assert set(names) == {"first/w"}
    assert len(data) == header_end + 8 + size + 3 * 4


def test_tensors_sent_by_digest_are_found_again_or_missed_by_name() -> None:
    frame = encode(sample(first={"w": torch.ones(8)}), ENVELOPE)
    short = to_bytes(frame, omit_blob=True)
    assert len(to_bytes(frame)) - len(short) > 8 * 4 - 1
    arrived = from_bytes(short, max_bytes=ROOM)
    assert (arrived.blob_digest, arrived.blob_size, arrived.blob) == (frame.blob_digest, frame.blob_size, None)
    with pytest.raises(PayloadError, match="did not arrive"):
        decode(arrived, KINDS)
    assert frame.blob is not None
    found = decode(with_blob(arrived, {frame.blob_digest: frame.blob}), KINDS)
    assert isinstance(found, Sample)
    assert found.first["w"].tolist() == [1.0] * 8
    with pytest.raises(PayloadError) as caught:
        with_blob(arrived, {"0" * 64: MemoryBlob(b"other")})
    assert caught.value.code == "BLOB_MISSING"


def test_tensors_after_a_header_that_announces_none_or_others_are_refused() -> None:
    frame = encode(sample(first={"w": torch.ones(8)}), ENVELOPE)
    assert frame.blob is not None
    blob = bytes(whole(frame.blob))
    for data in (to_bytes(encode(sample(), ENVELOPE)) + blob, to_bytes(frame) + b"x", to_bytes(frame)[:-1]):
        with pytest.raises(PayloadError, match="do not match"):
            from_bytes(data, max_bytes=ROOM)


def test_tensors_that_are_announced_count_against_the_cap_before_they_are_there() -> None:
    short = to_bytes(encode(sample(first={"w": torch.ones(8)}), ENVELOPE), omit_blob=True)
    room = len(to_bytes(encode(sample(first={"w": torch.ones(8)}), ENVELOPE)))
    assert from_bytes(short, max_bytes=room).blob_size
    with pytest.raises(PayloadError, match="at most"):
        from_bytes(short, max_bytes=room - 1)
    header = header_of(encode(sample(), ENVELOPE)) | {"blob": {"sha256": "a" * 64, "size": 10**10}}
    with pytest.raises(PayloadError, match="at most"):
        from_bytes(message(header), max_bytes=ROOM)


EXPECTED = manifest_of({"a": torch.zeros(2, 3), "b": torch.zeros(4)})


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"a": torch.zeros(2, 3)}, "'b' is missing"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)}, "'c' is not expected"),
        ({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, r"'a' is float32\[3, 2\], expected float32\[2, 3\]"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(4).half()}, r"'b' is float16\[4\]"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(0)}, r"'b' is float32\[0\]"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(4, 1)}, r"'b' is float32\[4, 1\]"),
        ({}, "'a' is missing"),
    ],
)
def test_other_tensors_than_agreed_are_refused_by_name_and_sender(tensors: Tensors, what: str) -> None:
    with pytest.raises(PayloadError, match=what) as caught:
        check_manifest(tensors, EXPECTED, sender="north")
    assert (caught.value.code, caught.value.where) == ("PAYLOAD_REFUSED", "north")


def test_a_spec_knows_its_size() -> None:
    for dtype in DTYPES:
        tensor = torch.zeros(3, 5, dtype=dtype)
        spec = TensorSpec.of(tensor)
        assert spec.num_bytes == tensor.numel() * tensor.element_size()
        assert TensorSpec.of(spec.zeros()) == spec
