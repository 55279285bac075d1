"""Aggregation: the time of each rule against numpy's addition of the same bytes, and the memory of a sum.

Run: python benchmarks/aggregation_speed.py            (about 12 minutes on 2 cores, 3 GB of memory)
     python benchmarks/aggregation_speed.py --only sum (half a minute)

50 updates of 4,194,304 parameters: LoRA r=8 on query and value of a 32-layer model that is 4096 wide, 128 tensors. They
lie in memory as they arrived. The yardstick is one pass of `numpy.add` over the same bytes: each update, as one flat
array, into one float32 accumulator, in one thread. It is timed beside every figure, and what is printed are ratios.

The sum is exact (docs/explanation/determinism.md): 64-bit integers, twice as wide as the yardstick's accumulator, each
value rounded to a grid first; with the extra `numba` in one compiled loop. The figure "float64" is numpy's addition of
the same bytes into an accumulator that is as wide. Memory is the peak of a process of its own, in which updates are
made one at a time.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

import numpy as np
import torch
from common import machine

from fedllm.aggregate import total
from fedllm.aggregate.compiled import compiled_loops
from fedllm.aggregate.lora import truncated_product
from fedllm.aggregate.robust import RobustSettings, Update, robust_mean
from fedllm.aggregate.server import DEFAULTS, StrategySettings, server_step
from fedllm.aggregate.total import GridSum
from fedllm.wire.blob import MemoryBlob, in_memory, parts_of
from fedllm.wire.payload import Tensors
from fedllm.wire.stored import StoredTensors, scan, table_of

LAYERS, WIDE, RANK = 32, 4096, 8
SHAPES = {
    f"layers.{layer}.{part}.lora_{factor}.weight": shape
    for layer in range(LAYERS)
    for part in ("q_proj", "v_proj")
    for factor, shape in (("A", (RANK, WIDE)), ("B", (WIDE, RANK)))
}
PARAMETERS = sum(rows * columns for rows, columns in SHAPES.values())
PARTIES = 50
WEIGHTS = [200 + 7 * number for number in range(PARTIES)]
COUNTS = (5, 20, 50)
ROBUST: dict[str, dict[str, object]] = {
    "NormClipping": {"clip_norm": 1.0},
    "Median": {"num_malicious": 10},
    "TrimmedMean": {"num_malicious": 10},
    "Krum": {"num_malicious": 10},
    "MultiKrum": {"num_malicious": 10},
    "GeometricMedian": {"num_malicious": 10},
    "FLTrust": {"root_party": "p0"},
}


def flat_update(number: int) -> np.ndarray:
    """Return a party's update as one array.

    Args:
        number: The party.
    """
    return np.random.default_rng(number).standard_normal(PARAMETERS, dtype=np.float32) * np.float32(1e-3)


def tensors_of(flat: np.ndarray) -> Tensors:
    """Return an update's tensors, as views.

    Args:
        flat: All its values.
    """
    tensors, at = Tensors(), 0
    for name, (rows, columns) in SHAPES.items():
        tensors[name] = torch.from_numpy(flat[at : at + rows * columns]).reshape(rows, columns)
        at += rows * columns
    return tensors


class Arrived:
    """Updates as they lie in memory after their messages were checked, and the same bytes as flat arrays."""

    def __init__(self, count: int) -> None:
        self.blobs: list[MemoryBlob] = []
        for number in range(count):
            tensors = {f"update/{name}": tensor for name, tensor in tensors_of(flat_update(number)).items()}
            self.blobs.append(in_memory(parts_of(tensors)))
        self.tables = [table_of(blob) for blob in self.blobs]
        self.flats = [np.frombuffer(blob.data, np.float32, offset=blob.size - 4 * PARAMETERS) for blob in self.blobs]

    def checked(self) -> Iterator[StoredTensors]:
        """Yield the updates, looked through for values that are not finite, as a run does when a message arrives."""
        for blob, table in zip(self.blobs, self.tables, strict=True):
            yield StoredTensors(blob, table, scan(blob, table)[0]["update"])


def numpy_pass(flats: list[np.ndarray], dtype: type[np.floating] = np.float32) -> None:
    """Add all updates into one accumulator.

    Args:
        flats: The updates.
        dtype: The accumulator's.
    """
    totals = np.zeros(PARAMETERS, dtype)
    for flat in flats:
        np.add(totals, flat, out=totals)


def grid_pass(updates: list[StoredTensors], weights: list[int]) -> Tensors:
    """Return fedllm's weighted mean.

    Args:
        updates: The updates.
        weights: One for each.
    """
    grid = GridSum()
    for update, weight in zip(updates, weights, strict=True):
        grid.add(update, weight=weight, counts={}, sender="party")
    return grid.means()


def in_passes(updates: list[StoredTensors], weights: list[int]) -> Tensors:
    """Return the same mean as where numba is not installed.

    Args:
        updates: The updates.
        weights: One for each.
    """
    with patch.object(total, "compiled_loops", lambda: None):
        return grid_pass(updates, weights)


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that something takes.

    Args:
        action: What is done.
    """
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def ratios(actions: dict[str, Callable[[], object]], yardstick: Callable[[], object], repeats: int) -> None:
    """Print each action's time as a ratio to the yardstick, which is timed right before and right after it.

    Args:
        actions: What is timed, in turns.
        yardstick: What it is compared with.
        repeats: Turns; one more comes first and is not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeats + 1):
        for name, action in actions.items():
            before, took, after = timed(yardstick), timed(action), timed(yardstick)
            if turn:
                found[name].append(2 * took / (before + after))
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} to {max(values):.2f} |", flush=True)


def sums(arrived: Arrived) -> None:
    """Print the time of the exact sum.

    Args:
        arrived: The updates.
    """
    print("\n| sum of 50 updates | against the pass of numpy, median | from, to |\n|---|---|---|")
    updates, equal = list(arrived.checked()), [1] * PARTIES
    actions: dict[str, Callable[[], object]] = {"numpy into float64": lambda: numpy_pass(arrived.flats, np.float64)}
    for name, weights in (("equal weights", equal), ("weights by examples", WEIGHTS)):
        if compiled_loops():
            actions[f"exact sum, {name}, with numba"] = lambda weights=weights: grid_pass(updates, weights)
        actions[f"exact sum, {name}, without"] = lambda weights=weights: in_passes(updates, weights)
    actions["the check that values are finite, before any sum"] = lambda: list(arrived.checked())
    ratios(actions, lambda: numpy_pass(arrived.flats), repeats=9)


def rules(arrived: Arrived) -> None:
    """Print the time of everything else that makes the next state.

    Args:
        arrived: The updates.
    """
    yardstick = lambda: numpy_pass(arrived.flats)  # noqa: E731
    updates = [Update(f"p{n}", WEIGHTS[n], tensors_of(flat)) for n, flat in enumerate(arrived.flats)]
    before, mean = tensors_of(flat_update(1000)), updates[0].tensors
    print("\n| step of the server, after the sum | against the pass | from, to |\n|---|---|---|")
    steps: dict[str, Callable[[], object]] = {}
    for name in DEFAULTS:
        settings = StrategySettings.model_validate({"name": name})
        memory = server_step(before, {}, mean, settings=settings)[1]
        steps[name] = lambda settings=settings, memory=memory: server_step(before, memory, mean, settings=settings)
    ratios(steps, yardstick, repeats=5)
    print("\n| in place of the sum | against the pass | from, to |\n|---|---|---|")
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    slow: dict[str, Callable[[], object]] = {
        "FlexLoRA": lambda: truncated_product(before, [update.tensors for update in updates], shares)
    }
    for name, values in ROBUST.items():
        robust = RobustSettings.model_validate({"name": name, **values})
        slow[name] = lambda robust=robust: robust_mean(before, updates, robust)
    ratios(slow, yardstick, repeats=2)


def peak_of(strategy: str, count: int) -> float:
    """Return the peak memory of a round's aggregation in a fresh process, in MB.

    Args:
        strategy: The server's step.
        count: The number of parties.
    """
    command = [sys.executable, __file__, "--one", strategy, str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def one_round(strategy: str, count: int) -> None:
    """Sum updates that are made one at a time, make the server's step, and print the process's peak memory in MB.

    Args:
        strategy: The server's step.
        count: The number of parties.
    """
    grid = GridSum()
    for number in range(count):
        grid.add(tensors_of(flat_update(number)), weight=WEIGHTS[number], counts={}, sender="party")
    settings = StrategySettings.model_validate({"name": strategy})
    server_step(tensors_of(flat_update(1000)), {}, grid.means(), settings=settings)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory() -> None:
    """Print the peak memory of each rule that needs only a sum, over the number of parties."""
    idle = peak_of("FedAvg", 0)
    size = PARAMETERS * 4 / 2**20
    print(f"\nan update is {size:.0f} MB; the process without any: {idle:.0f} MB")
    heads = " | ".join(f"N = {count}" for count in COUNTS)
    print(f"\n| peak memory above that, MB | {heads} | more for each party more |\n|---|" + "---|" * (len(COUNTS) + 1))
    for name in DEFAULTS:
        peaks = [peak_of(name, count) - idle for count in COUNTS]
        each = " | ".join(f"{peak:.0f}" for peak in peaks)
        print(
            f"| {name} | {each} | {(peaks[-1] - peaks[0]) / (COUNTS[-1] - COUNTS[0]) / size:+.1%} of an update |",
            flush=True,
        )


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["memory", "sum", "rules"], help="one of the parts")
    parser.add_argument("--one", nargs=2, metavar=("STRATEGY", "COUNT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one_round(args.one[0], int(args.one[1]))
        return
    print(f"{machine()}; {PARTIES} updates of {PARAMETERS:,} parameters in {len(SHAPES)} tensors", flush=True)
    # First, while this process is small: a new one begins with the peak of the one that made it.
    if args.only in (None, "memory"):
        memory()
    if args.only == "memory":
        return
    arrived = Arrived(PARTIES)
    if args.only != "rules":
        sums(arrived)
    if args.only != "sum":
        rules(arrived)


if __name__ == "__main__":
    main()
