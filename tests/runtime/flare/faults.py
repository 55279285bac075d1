"""One party misbehaves: its half is changed in its own process, with its own keys, as `FAULTS` says by round.

`FAULTS="east 1=raise 2=nan 3=shape 4=twice 5=replay 6=stuck"`.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

FAULTS = "FAULTS"
PRIVATE = "row 7 of the patients' file"
# Longer than a round may take in the tests.
STUCK_S = 18.0


def plan_of(text: str) -> tuple[str, dict[int, str]]:
    """Return the party and what it does in which round.

    Args:
        text: As above.
    """
    party, *words = text.split()
    return party, {int(number): fault for number, _, fault in (word.partition("=") for word in words)}


def install_here() -> None:
    """In the process of the party's half, as FLARE starts it: misbehave from now on."""
    party, plan = plan_of(os.environ.get(FAULTS, "nobody"))
    line = " ".join(sys.orig_argv)
    if "worker_process" in line and f"-c {party} " in line:
        install(party, plan)


def install(party: str, plan: dict[int, str]) -> None:
    """Change the classes that make up a party's half.

    Args:
        party: Who misbehaves.
        plan: What it does in which round.
    """
    from fedllm.runtime.host import PartyHost
    from fedllm.scenarios.base import Summand

    handle, packed = PartyHost._handle, PartyHost._packed

    def is_training(request: Any) -> bool:
        return bool(request.commits)

    def bad_handle(self: Any, request: Any, round_: int, deadline: float) -> Any:
        fault = plan.get(round_) if self.party == party and is_training(request) else None
        if fault == "raise":
            raise RuntimeError(PRIVATE)
        if fault == "stuck":
            time.sleep(STUCK_S)
        return handle(self, request, round_, deadline)

    def bad_packed(self: Any, payload: Any, envelope: Any) -> Any:
        if self.party == party and isinstance(payload, Summand) and payload.tensors:
            payload = Summand.model_construct(
                weight=payload.weight,
                counts=payload.counts,
                tensors=spoiled(dict(payload.tensors), plan.get(envelope.round, "")),
            )
        return packed(self, payload, envelope)

    PartyHost._handle = bad_handle  # type: ignore[method-assign]
    PartyHost._packed = bad_packed  # type: ignore[method-assign]
    if set(plan.values()) & {"twice", "replay"}:
        _repeat(plan)


def spoiled(tensors: dict[str, Any], fault: str) -> dict[str, Any]:
    """Return the tensors of an update as a fault makes them.

    Args:
        tensors: The update.
        fault: `nan`, `shape`, or another that leaves them as they are.
    """
    name = sorted(tensors)[-1]
    if fault == "nan":
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = float("nan")
    elif fault == "shape":
        tensors[name] = tensors[name].reshape(-1)
    return tensors


def _repeat(plan: dict[int, str]) -> None:
    """Deliver answers twice, or all the old ones again after each new one."""
    from fedllm.runtime.flare.desk import Desk
    from fedllm.runtime.flare.link import opened
    from fedllm.wire.frame import unpack

    deliver, old = Desk._deliver, list[Any]()

    def again(self: Any, body: Any) -> None:
        _, _, parcel = opened(body)
        fault = plan.get(unpack(parcel, max_bytes=2**30).envelope.round) if parcel else None
        deliver(self, body)
        for repeated in [body] if fault == "twice" else old if fault == "replay" else []:
            deliver(self, repeated)
        old.append(body)

    Desk._deliver = again  # type: ignore[method-assign]
