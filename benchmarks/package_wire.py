"""The package over the wire: what sealing, checking and writing cost beside one hash, and how many bytes are added.

Run: python benchmarks/package_wire.py            (half a minute, three times the size on disk)
     python benchmarks/package_wire.py --megabytes 2000

An owner and one party in one process, and no network: the figures are what comes on top of one. The package is random
weights in files of 100 MB. "hash" is one SHA-256 over the same files, the yardstick.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save_file

from fedllm.job.job import Job
from fedllm.models.digest import base_digest, file_digest
from fedllm.models.package import NOTE
from fedllm.models.package_files import num_pieces
from fedllm.privacy.secure_sum import Signatures
from fedllm.runtime.package_messages import PIECE, GivePiece, OfferPackage, SealPackage, TakeKey, TakePiece, WantPackage
from fedllm.runtime.package_party import Giver, Lineage, Taker

OWNER, PARTY = "owner", "north"
FILE_MB = 100


def package(folder: Path, megabytes: int) -> Path:
    """Write a package of about so many megabytes and return its folder."""
    folder.mkdir()
    count = max(1, megabytes // FILE_MB)
    for number in range(1, count + 1):
        tensor = torch.randn(FILE_MB * 250_000, generator=torch.Generator().manual_seed(number))
        save_file({f"weight{number}": tensor}, folder / f"model-{number:05}-of-{count:05}.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    files = {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
    (folder / NOTE).write_text(json.dumps({"blocks": {}, "files": files}))
    return folder


def ends(folder: Path, root: Path) -> tuple[Giver, Taker]:
    """Return an owner with a package, and a party that lacks it."""
    job = Job.model_validate(
        {
            "name": "bench",
            "parties": [OWNER, PARTY],
            "federation": {"num_rounds": 1},
            "model": {"model_name_or_path": "package"},
            "train": {"local_steps": 1},
        }
    )
    keys = {name: Ed25519PrivateKey.generate() for name in job.parties}

    def verify(name: str, text: bytes, signature: bytes) -> None:
        keys[name].public_key().verify(signature, text)

    lineage, digest = Lineage(job, "a" * 64, "b" * 32), base_digest(folder)
    giver = Giver(OWNER, lineage, folder, digest, Signatures(keys[OWNER].sign, verify))
    return giver, Taker(PARTY, OWNER, lineage, Signatures(keys[PARTY].sign, verify), root, 2**40)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    with tempfile.TemporaryDirectory() as scratch:
        folder = package(Path(scratch) / "package", parser.parse_args().megabytes)
        size = sum(path.stat().st_size for path in folder.iterdir())
        started = time.perf_counter()
        for path in folder.iterdir():
            file_digest(path)
        spent = {"hash": time.perf_counter() - started}
        giver, taker = ends(folder, Path(scratch) / "site")
        sealed = carry(giver, taker, spent)
        assert taker.folder is not None
    print(f"{machine()}\n\n| step | against the hash |\n|---|---|")
    for name, seconds in spent.items():
        print(f"| {name} | {seconds / spent['hash']:.1f} |")
    print(f"\n{size:,} bytes in {num_pieces(giver._files)} pieces, {sealed - size:,} more when sealed")


def carry(giver: Giver, taker: Taker, spent: dict[str, float]) -> int:
    """Bring the package over, note what each step takes, and return how long the sealed pieces were."""

    def timed(name: str, end: Giver | Taker, request: Any) -> Any:
        started = time.perf_counter()
        answer = end.answer(request)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
        return answer

    offered = timed("the owner states and signs", giver, OfferPackage())
    wanted = timed("the party asks", taker, WantPackage(statement=offered.statement, signature=offered.signature))
    boxes = timed("the owner seals the key, and checks the build", giver, SealPackage(keys={PARTY: wanted.key}))
    taker.answer(TakeKey(box=boxes.boxes[PARTY]))
    sealed, pieces = 0, num_pieces(giver._files)
    for number in range(pieces):
        piece = timed("the owner reads and seals", giver, GivePiece(number=number))
        sealed += piece.data[PIECE].numel()
        last = number == pieces - 1
        name = "the party checks the whole and settles it" if last else "the party opens and writes"
        timed(name, taker, TakePiece(number=number, data=piece.data))
    return sealed


if __name__ == "__main__":
    main()
