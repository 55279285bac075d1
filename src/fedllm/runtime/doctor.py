"""Look over this machine: what a run needs, what is there, and how to get what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
import torch

from fedllm.train.supervised import has_bf16

# The lowest versions that are safe or known to work; the package's metadata ask for the same.
FLOORS = {
    "torch": "2.10",
    "transformers": "5.3",
    "peft": "0.21",
    "safetensors": "0.8",
    "datasets": "5",
    "pydantic": "2.14",
    "rouge-score": "0.1.2",
    "sacrebleu": "2.6",
}
_DISK_BYTES = 2 * 10**9
_MEMORY_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    state: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def examine(folder: Path, *, num_threads: int | None = None) -> list[Finding]:
    """Return what was found out about this machine.

    Args:
        folder: Where run folders will be.
        num_threads: Compute threads that a job asks for.
    """
    found = [_python(), *(_package(name, floor) for name, floor in FLOORS.items())]
    found += [_disk(folder), _writable(folder), _memory(), _cores(num_threads), _accelerator(), _bfloat16()]
    return found


def _python() -> Finding:
    return Finding("python", "ok", platform.python_version())


def _package(name: str, floor: str) -> Finding:
    from packaging.version import Version

    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "fail", "not installed", f"pip install '{name}>={floor}'")
    if Version(found) < Version(floor):
        return Finding(name, "fail", f"{found} is below {floor}", f"pip install '{name}>={floor}'")
    return Finding(name, "ok", found)


def _disk(folder: Path) -> Finding:
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    short = free < _DISK_BYTES
    fix = "free some space, or name another folder with --output" if short else ""
    return Finding("disk", "fail" if short else "ok", f"{free / 1e9:.1f} GB free at {existing}", fix)


def _writable(folder: Path) -> Finding:
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as handle:
            handle.write(b"x")
            os.fsync(handle.fileno())
    except OSError as error:
        return Finding("write access", "fail", f"{existing}: {error.strerror}", "name another folder with --output")
    return Finding("write access", "ok", str(existing))


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    short = free < _MEMORY_BYTES
    fix = "close other programs, or take a smaller base model" if short else ""
    return Finding("memory", "warn" if short else "ok", f"{free / 1e9:.1f} GB available", fix)


def _cores(num_threads: int | None) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_threads and num_threads > cores:
        fix = "lower runtime.num_threads in the job; it changes the bits, so all parties must agree"
        return Finding("cores", "warn", f"{cores}, and the job asks for {num_threads} threads", fix)
    return Finding("cores", "ok", str(cores))


def _accelerator() -> Finding:
    if not torch.cuda.is_available():
        return Finding("accelerator", "ok", "none; runs on the CPU")
    return Finding("accelerator", "ok", torch.cuda.get_device_name(0))


def _bfloat16() -> Finding:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Finding("bfloat16", "ok", "supported" if has_bf16(device) else "not supported; keep `train.bf16: false`")
