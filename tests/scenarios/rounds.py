"""What tests of whole runs look at: the global adapters, the bytes, a run that breaks off, and the plan's foresight."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny import TinyFederation

from fedllm.runs.folder import RunFolder
from fedllm.runtime.plan import rehearse
from fedllm.runtime.run import RunResult, Watch, resume
from fedllm.runtime.validate import validate

# The metrics of what was on the wire, what parties sent first.
SENT = ("bytes_up", "bytes_after_up", "bytes_down", "bytes_after_down")
Adapter = dict[str, torch.Tensor]


def adapters(result: RunResult) -> dict[int, Adapter]:
    """Return the global adapters of the rounds that are kept, from the server's checkpoints."""
    run = RunFolder.open(result.path)
    try:
        states = run.checkpoints()
        loaded = {number: states.load(number).tensors for number in states.valid()}
    finally:
        run.close()
    head = "adapter/"
    return {
        number: {name.removeprefix(head): tensor for name, tensor in tensors.items() if name.startswith(head)}
        for number, tensors in loaded.items()
    }


def changed(before: Adapter, after: Adapter) -> set[str]:
    """Return which factors differ: `A`, `B`."""
    return {name.split(".lora_")[1][0] for name in before if not torch.equal(before[name], after[name])}


def bytes_of(result: RunResult, way: str) -> float:
    return sum(row["value"] for row in result.rows() if row["name"] == f"bytes_{way}" and row["round"] == 3)


def bytes_up(result: RunResult) -> dict[str, float]:
    """Return what each party sent in round 3."""
    rows = [row for row in result.rows() if row["name"] == "bytes_up" and row["round"] == 3]
    return {row["party"]: row["value"] for row in rows}


def own_adapters(result: RunResult) -> dict[str, bytes]:
    """Return each party's own adapter as the bytes of its file."""
    files = sorted(result.path.glob("parties/*/adapter/adapter_model.safetensors"))
    return {file.parts[-3]: file.read_bytes() for file in files}


def broken_and_resumed(federation: TinyFederation, *, after: int) -> RunResult:
    """Return the result of a run that was interrupted after a round and taken up again."""

    def stop(number: int, rows: Any) -> None:
        if number == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.run("broken", watch=Watch(on_round=stop))
    return resume(federation.folder / "broken")


def check_the_plan(federation: TinyFederation) -> None:
    """Run a job, and assert that the plan foretold its bytes."""
    foretold = rehearse(federation.job(), validate(federation.job(), federation.parties()))
    rows = [row for row in federation.run().rows() if row["name"] in SENT]
    assert foretold.total == pytest.approx(sum(row["value"] for row in rows), rel=0.02)
    for party, most in foretold.most_up.items():
        own: Counter[int] = Counter()
        for row in rows:
            if row["name"] in SENT[:2] and row["party"] == party:
                own[row["round"]] += row["value"]
        assert most.per_round == pytest.approx(max(own.values()), rel=0.02)
