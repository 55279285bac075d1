"""Look over this machine: what a run needs, what is there, and how to get what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Literal

import psutil
import torch
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from fedllm.errors import ConfigError
from fedllm.runs.plan_files import LIBRARIES
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
# The versions of NVIDIA FLARE that runs between machines are made for; the extra `flare` asks for the same.
ENGINE = "==2.9.*"
_DISK_BYTES = 2 * 10**9
_MEMORY_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    state: Literal["ok", "warn", "fault"]
    detail: str
    fix: str = ""


def examine(folder: Path, *, num_threads: int | None = None) -> list[Finding]:
    """Return what was found out about this machine.

    Args:
        folder: Where run folders will be.
        num_threads: Compute threads that a job asks for.
    """
    found = [python(), *(_package(name, floor) for name, floor in FLOORS.items())]
    found += [_disk(folder), _writable(folder), _memory(), _cores(num_threads), _accelerator(), _bfloat16()]
    return found


def python() -> Finding:
    """Return whether this Python is one that fedllm runs on."""
    wanted = metadata("fedllm")["Requires-Python"]
    found = platform.python_version()
    if Version(found) not in SpecifierSet(wanted):
        return Finding("python", "fault", f"{found}, and {wanted} is needed", "install fedllm with another Python")
    return Finding("python", "ok", found)


def _package(name: str, floor: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "fault", "not installed", f"pip install '{name}>={floor}'")
    if Version(found) < Version(floor):
        return Finding(name, "fault", f"{found} is below {floor}", f"pip install '{name}>={floor}'")
    return Finding(name, "ok", found)


def engine() -> Finding:
    """Return whether NVIDIA FLARE is there, in a version that fedllm works with."""
    fix = "pip install 'fedllm[flare]'"
    try:
        found = version("nvflare")
    except PackageNotFoundError:
        return Finding("nvflare", "fault", "not installed", fix)
    if Version(found) not in SpecifierSet(ENGINE):
        return Finding("nvflare", "fault", f"{found}, and {ENGINE} is needed", fix)
    return Finding("nvflare", "ok", found)


def constrained(file: Path) -> list[Finding]:
    """Return what of this machine's packages differs from a list of exact versions, `name==version` a line.

    Args:
        file: pip's constraints, the same at all sites.

    Raises:
        ConfigError: `FILE_NOT_FOUND`.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        fix = "name the constraints.txt that fedllm was installed with"
        raise ConfigError("FILE_NOT_FOUND", f"cannot read: {error.strerror}", where=str(file), fix=fix) from None
    found, differ = 0, list[str]()
    for name, _, wanted in (line.partition("#")[0].strip().partition("==") for line in lines):
        if not wanted:
            continue
        try:
            here = version(name)
            found += 1
            # A build for another device (`+cpu`) is the same version.
            if Version(here).public != Version(wanted.strip()).public:
                differ.append(f"{name} {here} instead of {wanted.strip()}")
        except (PackageNotFoundError, InvalidVersion):
            continue
    if differ:
        fix = f"pip install -c {file} 'fedllm[flare]'"
        # Other versions of these give other bits, or do not talk to each other.
        is_fault = any(text.split()[0] in (*LIBRARIES, "nvflare") for text in differ)
        return [Finding("versions", "fault" if is_fault else "warn", "; ".join(differ), fix)]
    return [Finding("versions", "ok", f"{found} packages as in {file}")]


def _disk(folder: Path) -> Finding:
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    short = free < _DISK_BYTES
    fix = "free some space, or name another folder with --output" if short else ""
    return Finding("disk", "fault" if short else "ok", f"{free / 1e9:.1f} GB free at {existing}", fix)


def _writable(folder: Path) -> Finding:
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as handle:
            handle.write(b"x")
            os.fsync(handle.fileno())
    except OSError as error:
        return Finding("write access", "fault", f"{existing}: {error.strerror}", "name another folder with --output")
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
