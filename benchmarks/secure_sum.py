"""Secure sums: time and bytes beside Flower's SecAgg+ and TenSEAL's CKKS, and what they cost with more parties.

Run: python benchmarks/secure_sum.py --make-environments DIR   (once; the others' packages, each in an environment)
     python benchmarks/secure_sum.py --environments DIR        (about 2 minutes on 2 cores, 4 GB of memory)
     python benchmarks/secure_sum.py                           (ours alone)
     python benchmarks/secure_sum.py --demo                    (the demo's job with secure sums and without)

Each party holds 13,625,344 float32 values in 128 tensors, as many as a LoRA of a model of some billions of parameters.
Everything of a sum is timed, in one process without a network: keys, shares, rounding to the grid, masks, the sum of
what is masked, opening it and the weighted mean. Bytes are what a party sends up; fedllm's are those of its messages as
they go over the wire. CKKS is timed on 262,144 values and taken times 52, for all of it is linear.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from common import machine
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from engine_baselines.environments import make_environments, python_of, versions
from engine_baselines.load import TENSORS, VALUES_A_TENSOR

from fedllm.errors import SenderRefused
from fedllm.job.job import Job
from fedllm.privacy.secure_sum import Signatures, least_of
from fedllm.runtime.run import run_local
from fedllm.runtime.scaffold import write_job_folder
from fedllm.runtime.sum_book import Opened, SumBook
from fedllm.runtime.sum_layout import Layout
from fedllm.runtime.sum_party import PartySums, SumTerms
from fedllm.runtime.sum_server import Answers, SecureTotal
from fedllm.scenarios.base import Summand
from fedllm.wire.codecs import Codec, CodecSettings
from fedllm.wire.frame import encode, pack
from fedllm.wire.payload import Envelope, Payload, Tensors, manifest_of

CKKS_VALUES = 262_144
HEX = "0" * 64


class Give(Payload):
    """A request whose answers are summed."""


class NoBook(SumBook):
    """Nothing of a benchmark is written down."""

    def note(self, job_digest: str, new: Opened) -> None:
        """Do nothing."""


class Parties:
    """Parties in memory, each with its update.

    Args:
        names: Their names.
        tensors: How many tensors an update has.
        values: How many values a tensor has.
        max_weight: The largest weight.
    """

    def __init__(self, names: list[str], *, tensors: int, values: int, max_weight: int) -> None:
        self.names, self.bytes_up, self.not_counted_s, self.masking_s = names, 0, 0.0, 0.0
        self.gone: set[str] = set()
        self.codec = Codec(CodecSettings.model_validate({"name": "Grid", "limit": 2.0**-6}))
        self.terms = SumTerms(
            tuple(names),
            lambda n: least_of(n, threshold=None, fewest=0),
            Layout(len(names), max_weight),
            num_rounds=1,
            private=lambda request: "update",
        )
        self.updates = {name: _update(number, tensors, values) for number, name in enumerate(names)}
        step = max(1, max_weight // len(names))
        self.weights = {name: min(max_weight, step * (number + 1)) for number, name in enumerate(names)}
        keys = {name: Ed25519PrivateKey.generate() for name in names}

        def verify(name: str, text: bytes, signature: bytes) -> None:
            try:
                keys[name].public_key().verify(signature, text)
            except InvalidSignature:
                raise SenderRefused("BAD_SIGNATURE", "not signed by it", where=name) from None

        book = NoBook(Path("/nonexistent"), "all")
        self.sums = {n: PartySums(n, HEX, HEX[:32], self.terms, Signatures(keys[n].sign, verify), book) for n in names}

    def asked(
        self, request: Payload | Mapping[str, Payload], round_: int, to: list[str] | tuple[str, ...]
    ) -> Iterator[tuple[str, Payload]]:
        """Yield each party's answer, and count its bytes."""
        for name in to:
            payload = request if isinstance(request, Payload) else request[name]
            if isinstance(payload, Give) and name in self.gone:
                continue
            answer = self._given(payload, name) if isinstance(payload, Give) else self.sums[name].answer(payload, 1)
            started = time.perf_counter()
            self.bytes_up += pack(encode(answer, _envelope(name))).num_bytes
            self.not_counted_s += time.perf_counter() - started
            yield name, answer

    def _given(self, request: Payload, name: str) -> Payload:
        self.sums[name].check_ready("update", encode(request, _envelope(name)))
        coded = self.codec.encode(self.updates[name], seed=1, party=name, number=1)
        started = time.perf_counter()
        answer = self.sums[name].masked(Summand(weight=self.weights[name], counts={}, tensors=coded))
        self.masking_s += time.perf_counter() - started
        return answer

    def mean(self) -> tuple[Tensors, float]:
        """Return the weighted mean by a secure sum, and the seconds that it took."""
        whole = manifest_of(self.updates[self.names[0]])
        answers = Answers(
            self.codec.manifest(whole), lambda party, parts: self.codec.decode(parts, whole, seed=1, number=1)
        )
        started = time.perf_counter()
        total = SecureTotal(self.asked, self.terms, HEX, HEX[:32], 1).of(Give(), self.names, answers)
        return total.means, time.perf_counter() - started - self.not_counted_s

    def error(self, mean: Tensors) -> float:
        """Return how far the mean of the first tensor is from the exact one, at most."""
        inside = [name for name in self.names if name not in self.gone]
        weight = sum(self.weights[name] for name in inside)
        exact = sum(self.updates[name]["t000"].double() * self.weights[name] for name in inside) / weight
        return float((mean["t000"].double() - exact).abs().max())


def _envelope(name: str) -> Envelope:
    return Envelope(job_digest=HEX, run_id=HEX[:32], round=1, sequence=1, sender=name, recipient="server")


def _update(number: int, tensors: int, values: int) -> Tensors:
    draw = np.random.default_rng(number)
    return {
        f"t{index:03d}": torch.from_numpy(draw.standard_normal(values, dtype=np.float32) * np.float32(1e-3))
        for index in range(tensors)
    }


def ours(parties: int, max_weight: int, *, tensors: int = TENSORS, gone: int = 0) -> dict[str, float]:
    """Return seconds, bytes up of a party, and the largest error of the mean.

    Args:
        parties: How many.
        max_weight: The largest weight.
        tensors: How many tensors each sends.
        gone: How many drop out once they were asked for their update.
    """
    names = [f"party{number:02d}" for number in range(parties)]
    made = Parties(names, tensors=tensors, values=VALUES_A_TENSOR, max_weight=max_weight)
    made.gone = set(names[:gone])
    mean, seconds = made.mean()
    sent = made.bytes_up / (parties - gone)
    return {"seconds": seconds, "bytes_up": sent, "error": made.error(mean), "masking": made.masking_s / parties}


def other(environments: Path, name: str, script: str, *arguments: int) -> dict[str, float]:
    """Return what a script of another package printed.

    Args:
        environments: The folder of their environments.
        name: The environment.
        script: In engine_baselines.
        arguments: For it.
    """
    path = Path(__file__).parent / "engine_baselines" / script
    command = [str(python_of(environments, name)), str(path), *map(str, arguments)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1200)
    found: dict[str, float] = json.loads(shown.stdout.strip().splitlines()[-1])
    return found


def compare(environments: Path | None, parties: int, repeats: int) -> None:
    """Print the table of one size, beside the others.

    Args:
        environments: Where the others are; None for fedllm alone.
        parties: How many.
        repeats: Runs of fedllm and of Flower, in turns; the median counts.
    """
    values = TENSORS * VALUES_A_TENSOR
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeats):
        for weight in (50, 1000):
            found.setdefault(f"fedllm, weights up to {weight}", []).append(ours(parties, weight))
        if environments:
            name = f"Flower SecAgg+ ({versions(environments, 'flower')})"
            sizes = (parties, TENSORS, VALUES_A_TENSOR)
            found.setdefault(name, []).append(other(environments, "flower", "flower_secagg.py", *sizes))
    if environments:
        name = f"CKKS ({versions(environments, 'tenseal')})"
        few, scale = other(environments, "tenseal", "tenseal_ckks.py", parties, CKKS_VALUES), values / CKKS_VALUES
        found[name] = [{"seconds": few["seconds"] * scale, "bytes_up": few["bytes_up"] * scale, "error": few["error"]}]
    print("| sum | time | to Flower's | bytes a value | to Flower's | largest error |\n|---|---|---|---|---|---|")
    middle = {name: sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2] for name, runs in found.items()}
    flower = next((run for name, run in middle.items() if name.startswith("Flower")), None)
    for name, run in middle.items():
        ratios = [run[key] / flower[key] if flower else float("nan") for key in ("seconds", "bytes_up")]
        time_, sent = f"{run['seconds']:.2f} s", f"{run['bytes_up'] / values:.2f}"
        print(f"| {name} | {time_} | {ratios[0]:.2f} | {sent} | {ratios[1]:.2f} | {run['error']:.1e} |", flush=True)


def grow() -> None:
    """Print what more parties and drop-outs cost, with 1,064,480 values a party."""
    values = 10 * VALUES_A_TENSOR
    print("\n| parties | drop out | bytes a value | masking at a party, to 3 parties | whole sum, to 3 parties |")
    print("|---|---|---|---|---|")
    first: dict[str, float] = {}
    for parties, gone in ((3, 0), (5, 0), (10, 0), (10, 3), (20, 0), (50, 0), (50, 10)):
        found = ours(parties, 1, tensors=10, gone=gone)
        first = first or found
        shares = [f"{found[key] / first[key]:.1f}" for key in ("masking", "seconds")]
        print(f"| {parties} | {gone} | {found['bytes_up'] / values:.2f} | {shares[0]} | {shares[1]} |", flush=True)


def demo() -> None:
    """Print the demo's held-out losses with secure sums and without, over the same codec."""
    with tempfile.TemporaryDirectory() as folder:
        print("| secure sums | codec | held-out loss by round | bytes up | adapter |\n|---|---|---|---|---|")
        for number, (codec, is_on) in enumerate(itertools.product(("Grid, limit=0.25", "fp32"), (False, True))):
            name, *limit = codec.split(", limit=")
            chosen = [f"federation.codec.name={name}", *(f"federation.codec.limit={value}" for value in limit)]
            chosen += ["federation.num_rounds=4", "evaluate.max_examples=1"]
            chosen += [f"privacy.secure_aggregation.enabled={str(is_on).lower()}"]
            place = Path(folder) / str(number)
            job = Job.from_yaml(write_job_folder(place), overrides=chosen)
            result = run_local(job, output=place / "run")
            rows = [
                row for row in result.rows() if row["name"] in ("loss_nats", "bytes_up") and row["value"] is not None
            ]
            losses = [
                r["value"] for r in rows if (r["name"], r["split"], r["party"]) == ("loss_nats", "held_out", None)
            ]
            sent = sum(row["value"] for row in rows if row["name"] == "bytes_up")
            shown = ", ".join(f"{loss:.6f}" for loss in losses)
            print(
                f"| {'on' if is_on else 'off'} | {name} | {shown} | {sent:,} | {str(result.adapter_sha256)[:12]} |",
                flush=True,
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-environments", type=Path, metavar="DIR")
    parser.add_argument("--environments", type=Path, metavar="DIR")
    parser.add_argument("--parties", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--demo", action="store_true")
    given = parser.parse_args()
    if given.demo:
        demo()
        return
    if given.make_environments:
        make_environments(given.make_environments, ["flower", "tenseal"])
        return
    torch.set_num_threads(1)
    print(f"{machine()}; {given.parties} parties, {TENSORS * VALUES_A_TENSOR:,} values each\n")
    compare(given.environments, given.parties, given.repeats)
    grow()


if __name__ == "__main__":
    main()
