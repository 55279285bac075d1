"""How FedHomoLLM's global adapter travels down: whole, or as an encoded change to the one before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fedllm.aggregate.folded import split
from fedllm.aggregate.lora import moving, travelling
from fedllm.scenarios.base import State
from fedllm.scenarios.fedhomollm_messages import prefixed, select
from fedllm.scenarios.fedhomollm_settings import Settings
from fedllm.wire.blob import in_memory, parts_of
from fedllm.wire.patch import Patched, next_sent
from fedllm.wire.payload import Tensors


def sent(settings: Settings, state: State) -> Mapping[str, torch.Tensor]:
    """Return the global adapter as it is sent: where it can be, with the change that leads to it.

    Args:
        settings: The scenario's.
        state: Its round's.
    """
    whole, change = _travelling(settings, state), select("change", state.tensors)
    return Patched(whole, change, state.fields["change_of"]) if change else whole


def as_sent(settings: Settings, state: State, tensors: Tensors, number: int) -> tuple[Tensors, dict[str, Any]]:
    """Return a round's new tensors with the adapter that the parties will hold, and what the change to it is of.

    Args:
        settings: The scenario's.
        state: Of the round before.
        tensors: What the server's step made of it.
        number: The round.
    """
    codec = settings.codec_down.codec
    if codec.is_plain:
        return tensors, {}
    before, lost = select("adapter", state.tensors), select("lost", state.tensors)
    tuned, beside = split(before)
    _, beside_after = split(select("adapter", tensors))
    if not _same(beside, beside_after):
        # What stands beside the adapter is new, and is no change to anything: all is sent whole, and nothing is owed.
        return tensors, {}
    names = moving(settings.lora_rule, tuned, number)
    found = next_sent(before, select("adapter", tensors), lost, names=names, codec=codec)
    made = prefixed("adapter", found.tensors) | prefixed("change", found.change) | prefixed("lost", found.lost)
    held = in_memory(parts_of(prefixed("adapter", _travelling(settings, state))))
    return tensors | made, {"change_of": held.digest}


def _same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _travelling(settings: Settings, state: State) -> Tensors:
    adapter = select("adapter", state.tensors)
    return {name: adapter[name] for name in travelling(settings.lora_rule, adapter)}
