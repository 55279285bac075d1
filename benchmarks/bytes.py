"""Codecs: bytes on the wire against their formula, and what they cost in quality.

Run: python benchmarks/bytes.py             (about 14 minutes on 2 cores)
     python benchmarks/bytes.py --wire      (the bytes alone, some seconds)
     python benchmarks/bytes.py --down      (the way down alone, about 6 minutes)
     python benchmarks/bytes.py --zstd      (whether a compressor behind the codecs pays; needs the zstd tool)

The first table is one party's answer with LoRA r=8 on the query-key-value projection of a 28-layer model that is 4096
wide (3,670,016 parameters: the size of the paper's example), encoded as it travels. The formula counts values, scales
and positions, and nothing of the message around them.

The second table is the demo's job with each codec: loss on the held-out data of all parties, over three seeds. The
spread of fp32 over the seeds is the noise that a codec's cost is compared with. The third table is for the way down:
ten parties, a base model that is a fifth of the demo's, loss on the common test set, bytes in the rounds after the
first.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import machine
from safetensors.torch import load_file
from ten_parties import job_folder, job_of, located_parties, small_base

from fedllm.aggregate.lora import sites, sketch_size
from fedllm.job.job import Job
from fedllm.runtime.run import run_local
from fedllm.runtime.scaffold import write_job_folder
from fedllm.scenarios.base import Summand
from fedllm.wire.blob import parts_of
from fedllm.wire.codecs import Codec, CodecSettings
from fedllm.wire.frame import encode, pack
from fedllm.wire.payload import Envelope, Tensors

LAYERS, WIDE, RANK, OUT = 28, 4096, 8, 12288
ENVELOPE = Envelope(job_digest="0" * 64, run_id="0" * 32, round=1, sequence=2**33, sender="north", recipient="server")
SEEDS = (1, 2, 3)
ROUNDS, STEPS = 8, 10
CODECS: dict[str, tuple[dict[str, Any], float]] = {
    # Name -> settings, and bytes for each parameter by the formula.
    "fp32": ({"name": "fp32"}, 4),
    "bf16": ({"name": "bf16"}, 2),
    "int8, error feedback": ({"name": "int8", "error_feedback": True}, 1 + 2 / 64),
    "int8": ({"name": "int8"}, 1 + 2 / 64),
    "int4, error feedback": ({"name": "int4", "error_feedback": True}, 1 / 2 + 2 / 64),
    "int4": ({"name": "int4"}, 1 / 2 + 2 / 64),
    "TopK 10 %, error feedback": ({"name": "TopK", "density": 0.1, "error_feedback": True}, 0.4 + 1 / 8),
    "TopK 10 %": ({"name": "TopK", "density": 0.1}, 0.4 + 1 / 8),
    "RandomK 10 %": ({"name": "RandomK", "density": 0.1}, 0.4),
    "RandomK 10 %, error feedback": ({"name": "RandomK", "density": 0.1, "error_feedback": True}, 0.4),
    "Grid 16 bits": ({"name": "Grid", "limit": 0.25, "bits": 16}, 2),
}
DOWN: dict[str, dict[str, dict[str, Any]]] = {
    # Name -> settings of the way down and of the way up.
    "fp32": {},
    "int8 down": {"codec_down": {"name": "int8"}},
    "int4 down": {"codec_down": {"name": "int4"}},
    "int8 both ways": {"codec_down": {"name": "int8"}, "codec": {"name": "int8", "error_feedback": True}},
}
OPTIONS = [
    f"federation.num_rounds={ROUNDS}",
    f"federation.eval_every={ROUNDS}",
    "federation.keep=last",
    "evaluate.max_examples=1",
]


def large_update() -> Tensors:
    """Return an update of 3,670,016 random parameters."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"lora_A": (RANK, WIDE), "lora_B": (OUT, RANK)}
    return {
        f"update/layers.{layer}.query_key_value.{factor}.default.weight": 1e-3 * torch.randn(shape, generator=generator)
        for layer in range(LAYERS)
        for factor, shape in shapes.items()
    }


def wire() -> None:
    """Print bytes of an answer as it travels, beside the formula."""
    update = large_update()
    parameters = sum(tensor.numel() for tensor in update.values())
    counts = {"loss_nats": 1234.5678901234567, "tokens": 12345.0, "examples": 100.0, "steps": 10.0}
    print(f"one answer, {parameters:,} parameters\n")
    print("| codec | MB | formula, MB | off | of fp32 |\n|---|---|---|---|---|")
    plain = 0
    for name, (values, each) in CODECS.items():
        coded = Codec(CodecSettings.model_validate(values)).encode(update, seed=1, party="north", number=1)
        # The drift meter is on by default.
        coded |= {f"drift/{site}": torch.ones(sketch_size(OUT)) for site in sites(update)}
        parcel = pack(encode(Summand(weight=1, counts=counts, tensors=coded), ENVELOPE))
        sent, foretold = parcel.num_bytes, parameters * each
        plain = plain or sent
        print(f"| {name} | {sent / 1e6:.3f} | {foretold / 1e6:.3f} | {sent / foretold - 1:+.2%} | {sent / plain:.1%} |")


def quality(folder: Path) -> None:
    """Print the held-out loss with each codec.

    Args:
        folder: Where jobs and runs go.
    """
    print(f"\nthe demo's job, {ROUNDS} rounds, seeds {SEEDS}\n")
    print("| codec | held-out loss, mean | by seed | against fp32 | bytes up, of fp32 |\n|---|---|---|---|---|")
    base_losses, base_bytes = list[float](), 0.0
    for name, (values, _) in CODECS.items():
        found = [one_run(folder / f"{len(list(folder.iterdir()))}", values, seed) for seed in SEEDS]
        losses, up = [loss for loss, _ in found], sum(sent for _, sent in found)
        base_losses, base_bytes = base_losses or losses, base_bytes or up
        # The same seed on both sides: what differs is the codec.
        off = statistics.fmean(loss / plain - 1 for loss, plain in zip(losses, base_losses, strict=True))
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {name} | {statistics.fmean(losses):.4f} | {each} | {off:+.2%} | {up / base_bytes:.1%} |", flush=True)
    print(
        f"\nfp32 over the seeds: standard deviation {statistics.stdev(base_losses) / statistics.fmean(base_losses):.2%}"
    )


def down(folder: Path) -> None:
    """Print the loss and the bytes with each codec on the way down, over ten parties.

    Args:
        folder: Where the base model, jobs and runs go.
    """
    base = small_base(folder / "base")
    print(f"\nten parties, {ROUNDS} rounds of {STEPS} steps, seeds {SEEDS}\n")
    print(
        "| codec | test loss, mean | by seed | against fp32 | down, of fp32 | up, of fp32 |\n|---|---|---|---|---|---|"
    )
    plain: list[tuple[float, float, float]] = []
    for name, settings in DOWN.items():
        found = [ten_parties_run(folder / f"{name} {seed}", base, settings, seed) for seed in SEEDS]
        plain = plain or found
        losses = [loss for loss, _, _ in found]
        off = statistics.fmean(loss / other[0] - 1 for loss, other in zip(losses, plain, strict=True))
        shares = [sum(row[way] for row in found) / sum(row[way] for row in plain) for way in (1, 2)]
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        cells = f"{statistics.fmean(losses):.4f} | {each} | {off:+.2%} | {shares[0]:.1%} | {shares[1]:.1%}"
        print(f"| {name} | {cells} |", flush=True)
    losses = [loss for loss, _, _ in plain]
    print(f"\nfp32 over the seeds: standard deviation {statistics.stdev(losses) / statistics.fmean(losses):.2%}")


def ten_parties_run(folder: Path, base: Path, settings: dict[str, Any], seed: int) -> tuple[float, float, float]:
    """Return the last loss on the common test set, and the bytes down and up in the rounds after the first.

    Args:
        folder: Where the run goes.
        base: The base model's folder.
        settings: Other `federation` settings.
        seed: Its seed.
    """
    place = job_folder(folder / "job", seed, concentration=None)
    federation = {"num_rounds": ROUNDS, "eval_every": ROUNDS} | settings
    job = job_of(place, base, seed=seed, federation=federation, train={"local_steps": STEPS, "learning_rate": 0.01})
    rows = run_local(job, parties=located_parties(place), output=folder / "run").rows()
    loss = [row["value"] for row in rows if (row["name"], row["split"]) == ("loss_nats", "common")][-1]
    way = {
        name: sum(r["value"] for r in rows if r["name"] == name and r["round"] > 1)
        for name in ("bytes_down", "bytes_up")
    }
    return float(loss), way["bytes_down"], way["bytes_up"]


def zstd(folder: Path) -> None:
    """Print what zstd leaves of what codecs send: of random values, and of the factors B that two rounds made of 0.

    Args:
        folder: Where a job and its run go.
    """
    tool = shutil.which("zstd") or sys.exit("there is no zstd here")
    job = Job.from_yaml(write_job_folder(folder / "job"), overrides=[*OPTIONS, "federation.num_rounds=2"])
    adapter = run_local(job, output=folder / "run").adapter
    trained = {name: t for name, t in load_file(adapter / "adapter_model.safetensors").items() if ".lora_B." in name}
    print("\n| codec | random values, zstd -3 | -19 | a trained update, -3 | -19 |\n|---|---|---|---|---|")
    for name, (values, _) in CODECS.items():
        cells = []
        for update in (large_update(), trained):
            coded = Codec(CodecSettings.model_validate(values)).encode(update, seed=1, party="north", number=1)
            plain = b"".join(bytes(part) for part in parts_of(coded))
            for level in ("-3", "-19"):
                packed = subprocess.run([tool, level, "-c"], input=plain, capture_output=True, check=True).stdout
                cells.append(f"{len(packed) / len(plain):.1%}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def one_run(folder: Path, codec: dict[str, Any], seed: int) -> tuple[float, float]:
    """Return the last held-out loss of a run and the bytes that went up in its rounds.

    Args:
        folder: Where it goes.
        codec: Its codec.
        seed: Its seed.
    """
    job_file = write_job_folder(folder)
    chosen = [
        f"federation.codec.{key}={str(value).lower() if value is True else value}" for key, value in codec.items()
    ]
    job = Job.from_yaml(job_file, overrides=[*OPTIONS, *chosen, f"seed={seed}"])
    rows = run_local(job, output=folder / "run").rows()
    loss = next(
        row["value"]
        for row in reversed(rows)
        if (row["name"], row["split"], row["party"]) == ("loss_nats", "held_out", None)
    )
    return float(loss), sum(row["value"] for row in rows if row["name"] == "bytes_up" and row["round"] > 0)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wire", action="store_true", help="only the bytes")
    parser.add_argument("--down", action="store_true", help="only the way down")
    parser.add_argument("--zstd", action="store_true", help="only what a compressor would save")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        if args.zstd:
            zstd(Path(folder))
            return
        if not args.down:
            wire()
        if not args.down and not args.wire:
            quality(Path(folder))
        if not args.wire:
            down(Path(folder))


if __name__ == "__main__":
    main()
