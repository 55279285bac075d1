"""A secure sum that is aborted leaves nothing unmasked: not in a file of the run or of a party, and in no log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TinyFederation

from fedllm.errors import RunFailed, RunPaused
from fedllm.runtime.run import RunResult
from fedllm.runtime.sum_layout import Layout
from fedllm.runtime.sum_messages import OpenSum
from fedllm.runtime.sum_party import PartySums
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.supervised import SupervisedTrainer
from fedllm.wire.codecs import Codec, CodecSettings
from fedllm.wire.payload import Payload

Make = Callable[..., TinyFederation]
SIZES = {"north": 6, "east": 9, "south": 4, "west": 5}
GONE = ("south", "west")
GRID = {"name": "Grid", "limit": 0.5}
PLAN: dict[str, Any] = {
    "federation.num_rounds": 1,
    "federation.keep": "last",
    "federation.codec": GRID,
    "privacy.secure_aggregation": {"enabled": True},
}
# So few values in a row are enough to be found; so many of a tensor that holds little more than signs.
FEW, MANY = 8, 32


@dataclass
class Known:
    """What nobody but the party itself may know: each party's update, and what is summed."""

    updates: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    counts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Note each summand of round 1 before it is masked."""
        words = Layout.words

        def noted(layout: Any, summand: Any, manifest: Any, *, party: str) -> Any:
            found = {name: tensor.numpy() for name, tensor in summand.tensors.items() if name.startswith("update/")}
            if found:
                self.counts[party] = {name: array.astype(np.int64).reshape(-1) for name, array in found.items()}
                self.weights[party] = summand.weight
            return words(layout, summand, manifest, party=party)

        monkeypatch.setattr(Layout, "words", noted)

    def needles(self) -> dict[str, list[bytes]]:
        """Return what is searched for, by whose it is."""
        step = np.float32(Codec(CodecSettings.model_validate(GRID)).step)
        found = {
            party: [w for array in whole.values() for w in as_floats(array)] for party, whole in self.updates.items()
        }
        names = sorted(next(iter(self.counts.values())))
        for party, counts in self.counts.items():
            for array in counts.values():
                found[party] += as_integers(array) + as_integers(array * self.weights[party])
                found[party] += as_floats(array.astype(np.float32) * step)
        found["sum"] = []
        for parties in (list(self.counts), [party for party in self.counts if party not in GONE]):
            for name in names:
                total = sum(self.counts[party][name] * self.weights[party] for party in parties)
                mean = total * float(step) / sum(self.weights[party] for party in parties)
                found["sum"] += as_integers(total) + as_floats(total * float(step)) + as_floats(mean)
        return found


def windows(values: np.ndarray) -> list[np.ndarray]:
    """Return some values in a row that are hardly anywhere by chance: from the start, the middle and the end."""
    found: list[np.ndarray] = []
    for size in (FEW, MANY):
        rows = [values[at : at + size] for at in (0, (len(values) - size) // 2, len(values) - size)]
        found += [row for row in rows if np.count_nonzero(row) == size and len(set(row.tolist())) > MANY // size]
    return found


def as_text(values: np.ndarray) -> list[bytes]:
    return [between.join(map(str, values.tolist())).encode() for between in (", ", ",", " ")]


def as_floats(values: np.ndarray) -> list[bytes]:
    """Return some of the values as bytes of float32 and float64, in hexadecimal, and as decimals."""
    found: list[bytes] = []
    for row in windows(values):
        narrow = row.astype(np.float32)
        raw = [narrow.tobytes(), row.astype(np.float64).tobytes()]
        found += [*raw, *(data.hex().encode() for data in raw), *as_text(narrow)]
    return found


def as_integers(values: np.ndarray) -> list[bytes]:
    """Return some of the values as words of 2, 3, 4 and 8 bytes, in hexadecimal, and as decimals."""
    found: list[bytes] = []
    for row in windows(values):
        whole = row.astype("<i8").view(np.uint8).reshape(len(row), 8)
        # Of fewer bytes only where they hold the values.
        sizes = [size for size in (2, 3, 4, 8) if np.abs(row).max() < 2 ** (8 * size - 1)]
        raw = [whole[:, :size].tobytes() for size in sizes]
        found += [*raw, *(data.hex().encode() for data in raw), *as_text(row)]
    return found


class Noting:
    """Trains as usual and notes by how much each party's training has moved the adapter; some fail after it."""

    def __init__(self, known: Known, *failing: str) -> None:
        self.known, self.failing = known, failing

    def train(self, task: TrainTask, optimizer: Any) -> TrainSums:
        before = {name: tensor.detach().clone() for name, tensor in task.model.trainable.items()}
        sums = SupervisedTrainer().train(task, optimizer)
        moved = {name: (tensor.detach() - before[name]).reshape(-1) for name, tensor in task.model.trainable.items()}
        self.known.updates[task.party] = {name: tensor.to(torch.float32).numpy() for name, tensor in moved.items()}
        if task.party in self.failing:
            raise RunFailed("NONFINITE", "it diverged")
        return sums


def found_in(folder: Path, records: list[logging.LogRecord], needles: dict[str, list[bytes]]) -> set[str]:
    """Return whose update is in any file below a folder or in any record of a log."""
    logs = "\n".join(f"{record.getMessage()} {record.__dict__!r} {record.exc_text}" for record in records)
    files = (path.read_bytes() for path in folder.rglob("*") if path.is_file())
    text = b"\n--\n".join([logs.encode(), *files])
    return {name for name, rows in needles.items() if any(row in text for row in rows)}


def run_of(
    federation: TinyFederation, monkeypatch: pytest.MonkeyPatch, *failing: str
) -> tuple[Known, Callable[[], RunResult]]:
    known = Known()
    known.watch(monkeypatch)
    return known, lambda: federation.run(trainer=Noting(known, *failing))


def drop_out_at_the_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = PartySums.answer

    def gone(self: Any, request: Payload, round_: int) -> Payload:
        if isinstance(request, OpenSum) and request.what == "update" and self.party in GONE:
            raise RunFailed("PARTY_FAILED", "it is gone")
        return answer(self, request, round_)

    monkeypatch.setattr(PartySums, "answer", gone)


@pytest.mark.parametrize("weight_by", ["equal", "examples"])
@pytest.mark.parametrize("step", ["training", "opening"])
def test_no_file_and_no_log_of_an_aborted_sum_holds_an_update_or_the_sum(
    step: str,
    weight_by: str,
    make_federation: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN | {"federation.weight_by": weight_by})
    if step == "opening":
        drop_out_at_the_opening(monkeypatch)
    known, run = run_of(federation, monkeypatch, *(GONE if step == "training" else ()))
    with caplog.at_level(logging.DEBUG), pytest.raises(RunPaused) as caught:
        run()
    assert caught.value.code == "SUM_ABORTED" and caplog.records
    # All four trained; where two dropped out at the opening, the server had all four masked.
    assert set(known.updates) == set(SIZES)
    assert len(known.counts) == (4 if step == "opening" else 2)
    needles = known.needles()
    assert all(len(rows) > 50 for rows in needles.values())
    assert found_in(federation.folder, caplog.records, needles) == set()
    # What is laid there is found: as floats, as words, and as text.
    for name, rows in needles.items():
        for row in (rows[0], rows[len(rows) // 2], rows[-1]):
            leak = federation.folder / "run" / "parties" / "north" / "leak"
            leak.write_bytes(b"\x00\x01\x02" + row + b"\x03")
            assert found_in(federation.folder, [], needles) == {name}
            leak.unlink()
        told = logging.LogRecord("fedllm", logging.DEBUG, "", 0, "sent [%s]", (rows[-1].decode(),), None)
        assert found_in(federation.folder, [told], needles) == {name}


def test_the_same_search_finds_the_sum_where_it_was_opened_and_no_part_of_it(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The matrices B begin at zero, so that after round 1 the adapter holds their mean update as it is.
    federation = make_federation(sizes=SIZES, job=PLAN)
    known, run = run_of(federation, monkeypatch)
    with caplog.at_level(logging.DEBUG):
        assert run().status == "SUCCESS"
    assert found_in(federation.folder, caplog.records, known.needles()) == {"sum"}
