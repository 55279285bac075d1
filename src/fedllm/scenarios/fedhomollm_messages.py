"""FedHomoLLM's messages, and how tensors are named in them and in what the halves keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedllm.scenarios.fedhomollm_settings import Settings, rule_of
from fedllm.wire.payload import Payload, TensorMap, Tensors

Split = Literal["held_out", "common"]


class SendInitial(Payload):
    """Server -> one party: make the first adapter from the job's seed."""


class Initial(Payload):
    """Party -> server: the first adapter. It depends on the seed and the base model alone."""

    adapter: TensorMap


class Train(Payload):
    """Server -> parties: start from this adapter and train for one round.

    `control` is SCAFFOLD's control variate at the server. Where a party keeps something of its own, `counted` says in
    which round an answer of each party was last counted, and `best` the round that would be delivered if it is not the
    last one. Where whole parties are hidden, updates are clipped to `clip_norm`.
    """

    commits: ClassVar[bool] = True
    adapter: TensorMap
    control: TensorMap = Field(default_factory=dict)
    counted: dict[str, int] = Field(default_factory=dict)
    best: int | None = None
    clip_norm: float | None = None


class Evaluate(Payload):
    """Server -> parties: the loss of this adapter on one split; `counted` as in `Train`."""

    adapter: TensorMap
    split: Split
    counted: dict[str, int] = Field(default_factory=dict)


class Deliver(Payload):
    """Server -> parties, where each has a model of its own: make an adapter of this and of what you kept.

    `delivered` is the round that it is of.
    """

    adapter: TensorMap
    counted: dict[str, int]
    delivered: int


class Delivered(Payload):
    """Party -> server: it has its adapter."""


def private(settings: Settings, request: Payload) -> str:
    """Return what a request's answers add up to, where none may be seen by itself; else empty.

    It follows from the job's settings and the kind of request, never from what else the server writes into it. Of a
    common model and the common test set nothing is anyone's own.

    Args:
        settings: The scenario's.
        request: The request.
    """
    match request:
        case Train():
            return "update"
        case Evaluate():
            return request.split if request.split == "held_out" or rule_of(settings).keeps_state else ""
    return ""


def prefixed(prefix: str, tensors: Mapping[str, Any]) -> Tensors:
    """Return tensors with a prefix before their names.

    Args:
        prefix: Without the stroke.
        tensors: By name.
    """
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def select(prefix: str, tensors: Mapping[str, Any]) -> Tensors:
    """Return the tensors with a prefix, without it.

    Args:
        prefix: Without the stroke.
        tensors: By name.
    """
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
