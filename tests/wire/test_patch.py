"""Changes to tensors that were sent before: both ends come to the same bits, and nothing is owed in the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import bits

from fedllm.errors import PayloadError
from fedllm.wire.blob import Blob, in_memory, parts_of, whole
from fedllm.wire.patch import DownSettings, Patched, applied, next_sent
from fedllm.wire.payload import Tensors

CODECS = ["bf16", "int8", "int4"]
NAMES = ["a", "b"]


def draw(seed: int, *, scale: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {"a": scale * torch.randn(5, 70, generator=generator), "b": scale * torch.randn(33, generator=generator)}


def blob_of(tensors: Tensors, head: str = "adapter") -> Blob:
    return in_memory(parts_of({f"{head}/{name}": tensor for name, tensor in tensors.items()}))


def down(name: str) -> Any:
    return DownSettings.model_validate({"name": name}).codec


@pytest.mark.parametrize("name", CODECS)
@given(seed=st.integers(0, 2**20), rounds=st.integers(1, 5))
@settings(max_examples=15)
def test_a_receiver_comes_to_the_sender_s_bits_round_after_round(name: str, seed: int, rounds: int) -> None:
    codec, before, lost = down(name), draw(seed), Tensors()
    held = blob_of(before)
    for number in range(rounds):
        wanted = {key: before[key] + step for key, step in draw(seed + number + 1, scale=0.01).items()}
        names = NAMES if number % 2 else ["b"]
        sent = next_sent(before, wanted, lost, names=names, codec=codec)
        held = applied(held, blob_of(sent.change), codec, digest=blob_of(sent.tensors).digest)
        assert bytes(whole(held)) == bytes(whole(blob_of(sent.tensors)))
        assert all(torch.equal(sent.tensors[key], before[key]) for key in set(NAMES) - set(names))
        before, lost = sent.tensors, sent.lost


@pytest.mark.parametrize("name", CODECS)
def test_what_is_sent_and_what_is_owed_add_up_to_what_was_wanted(name: str) -> None:
    codec, lost = down(name), Tensors()
    start = here = draw(0)
    wanted = {key: tensor.double() for key, tensor in start.items()}
    for number in range(30):
        steps = draw(number + 1, scale=0.01)
        wanted = {key: tensor + steps[key] for key, tensor in wanted.items()}
        sent = next_sent(here, {key: here[key] + steps[key] for key in NAMES}, lost, names=NAMES, codec=codec)
        here, lost = sent.tensors, sent.lost
    for key in NAMES:
        off = here[key].double() + lost[key] - wanted[key]
        assert off.abs().max() < 1e-5
        # What is owed is a part of one step, not of thirty.
        assert lost[key].abs().max() < 0.02
        assert bits({"x": here[key]}) != bits({"x": start[key]})


def spoiled(change: Tensors) -> dict[str, Blob]:
    other = {key: tensor.clone() for key, tensor in change.items()}
    other["a#values"][0] += 1
    return {
        "other values": blob_of(other),
        "another field": blob_of(change, head="control"),
        "a tensor too few": blob_of({key: tensor for key, tensor in change.items() if key != "b#scales"}),
        "a tensor too many": blob_of(change | {"c#values": torch.zeros(3, dtype=torch.int8)}),
        "another shape": blob_of(change | {"b#values": torch.zeros(32, dtype=torch.int8)}),
        "noise": in_memory([b"\x80\x04pickle" * 3]),
        "nothing": in_memory([b""]),
    }


def test_a_change_that_does_not_lead_there_asks_for_the_whole() -> None:
    codec, before = down("int8"), draw(0)
    sent = next_sent(before, draw(1), {}, names=NAMES, codec=codec)
    goal = blob_of(sent.tensors).digest
    assert applied(blob_of(before), blob_of(sent.change), codec, digest=goal).digest == goal
    for patch in spoiled(sent.change).values():
        with pytest.raises(PayloadError, match="BLOB_MISSING"):
            applied(blob_of(before), patch, codec, digest=goal)


def test_a_change_to_other_tensors_asks_for_the_whole() -> None:
    codec = down("int8")
    sent = next_sent(draw(0), draw(1), {}, names=NAMES, codec=codec)
    with pytest.raises(PayloadError, match="BLOB_MISSING"):
        applied(blob_of(draw(2)), blob_of(sent.change), codec, digest=blob_of(sent.tensors).digest)


@pytest.mark.parametrize("values", [{"name": "TopK"}, {"name": "bf16", "block_size": 64}, {"block_size": 64}, 3])
def test_a_setting_without_effect_is_refused(values: Any) -> None:
    with pytest.raises(ValidationError):
        DownSettings.model_validate(values)


def test_patched_tensors_look_like_the_whole() -> None:
    tensors = draw(0)
    patched = Patched(tensors, {}, "a" * 64)
    assert {**patched} == tensors
    assert len(patched) == 2
