"""What a site's guard notes, counts and refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyFederation

from fedllm.errors import PolicyError, ResourceError
from fedllm.runs.audit_log import AuditLog, read_log
from fedllm.runs.audit_verify import verify_log
from fedllm.runtime.guard import Guard, digest_of
from fedllm.scenarios.base import Summand
from fedllm.scenarios.fedhomollm import SendInitial, Train
from fedllm.wire.frame import encode, pack
from fedllm.wire.payload import Envelope, Payload

Make = Callable[..., TinyFederation]
RUN_ID = "0" * 32


def guard_of(federation: TinyFederation, folder: Path) -> Guard:
    located = federation.parties()[0]
    log = AuditLog.open(folder / "audit.jsonl", actor="north")
    return Guard(log, federation.job(), located.party, folder, RUN_ID)


def message(payload: Payload, *, number: int, sender: str = "server", recipient: str = "north") -> tuple[Any, Any]:
    envelope = Envelope(
        job_digest="a" * 64, run_id=RUN_ID, round=number, sequence=0, sender=sender, recipient=recipient
    )
    frame = encode(payload, envelope)
    return frame, pack(frame)


def update(number: int) -> tuple[Any, Any]:
    tensors = {"w": torch.ones(100)}
    return message(Summand(weight=1, counts={}, tensors=tensors), number=number, sender="north", recipient="server")


def test_each_message_is_noted_with_what_is_needed_to_know_it_again(make_federation: Make, tmp_path: Path) -> None:
    guard = guard_of(make_federation(), tmp_path)
    frame, parcel = message(SendInitial(), number=0)
    guard.asked(frame, parcel)
    frame, answer = update(0)
    guard.answered(frame, answer)
    noted = [entry for _, _, entry in read_log(tmp_path / "audit.jsonl") if entry]
    assert [(entry.way, entry.kind, entry.peer) for entry in noted] == [
        ("asked", "SendInitial", "server"),
        ("answered", "Summand", "server"),
    ]
    assert [entry.digest for entry in noted] == [digest_of(parcel), digest_of(answer)]
    assert verify_log(tmp_path / "audit.jsonl") == []


def test_an_operation_outside_the_sites_list_is_refused_and_allowed_without_one(
    make_federation: Make, tmp_path: Path
) -> None:
    narrow = make_federation("narrow", party={"limits.allowed_operations": ["SendInitial", "Evaluate"]})
    frame, parcel = message(Train(adapter={"w": torch.ones(1)}), number=1)
    with pytest.raises(PolicyError) as caught:
        guard_of(narrow, tmp_path).asked(frame, parcel)
    assert caught.value.code == "POLICY_REFUSED"
    guard_of(make_federation("wide"), tmp_path).asked(frame, parcel)


def test_what_left_is_counted_by_round_and_run_also_after_a_restart(make_federation: Make, tmp_path: Path) -> None:
    frame, parcel = update(1)
    size = parcel.num_bytes
    federation = make_federation(party={"limits.max_upload_bytes": 3 * size + 10})
    for number in (1, 1, 2):
        frame, parcel = update(number)
        guard_of(federation, tmp_path).answered(frame, parcel)
    with pytest.raises(PolicyError):
        guard_of(federation, tmp_path).answered(*update(3))
    by_round = make_federation("by-round", party={"limits.max_upload_bytes_per_round": size + 10})
    (tmp_path / "other").mkdir()
    guard_of(by_round, tmp_path / "other").answered(*update(1))
    with pytest.raises(PolicyError):
        guard_of(by_round, tmp_path / "other").answered(*update(1))
    guard_of(by_round, tmp_path / "other").answered(*update(2))


def test_what_cannot_be_noted_is_not_done(
    make_federation: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = guard_of(make_federation(), tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise ResourceError("DISK_FULL", "cannot write")

    monkeypatch.setattr(AuditLog, "append", full)
    with pytest.raises(ResourceError):
        guard.asked(*message(SendInitial(), number=0))
    with pytest.raises(ResourceError):
        guard.answered(*update(0))
