"""A suspect model as a claim reads it: what it changed of the base, at the sites of the claim.

A suspect is an adapter in PEFT's layout, or a whole model in transformers' layout beside the base that it came from.
Nothing is run, and no code of the suspect is loaded: tensors are read from safetensors files by name.

Shapes: R and K rows and columns of a site, r rank, N bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fedllm.errors import ModelError
from fedllm.models.deliver import CONFIG, WEIGHTS
from fedllm.models.digest import base_digest
from fedllm.models.load import find_base
from fedllm.models.settings import ModelSettings
from fedllm.ownership.claims import MarkSite

# How the change of a weight is read: as it is, or after taking out factors by which its rows and columns were scaled.
READINGS = ("as it is", "rescaled")
_SWEEPS = 3
_PREFIX = "base_model.model."
# Of a norm's scale beside an adapter, and of one that was tuned by LN_TUNING; without PEFT's prefix in our own layout.
# Names under which GPTQ, AWQ and compressed-tensors keep what they packed.
_PACKED = ("qweight", "weight_packed")
_SCALES = (".weight", ".ln_tuning_layers.weight")


class Suspect(Protocol):
    """What a claim looks at. A site that the suspect does not have changes nothing there."""

    def has(self, site: MarkSite) -> bool:
        """Return whether the suspect has tensors of this site's name."""
        ...

    def product(self, site: MarkSite, left: torch.Tensor, right: torch.Tensor, reading: str) -> torch.Tensor:
        """Return u_j^T D v_j for each bit, (N,), of the change D of a weight; `left` (N, R), `right` (N, K)."""
        ...

    def times(self, site: MarkSite, right: torch.Tensor) -> torch.Tensor:
        """Return D X, (R, M), of the change D of a weight; `right` X is (K, M)."""
        ...

    def scale(self, site: MarkSite) -> torch.Tensor:
        """Return the change of a norm's scale, (R,)."""
        ...


@dataclass(frozen=True)
class Files:
    """Tensors of a folder's safetensors files, each read when it is asked for."""

    folder: Path
    _where: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, pattern: str = "*.safetensors") -> Files:
        """Return the tensors of a folder.

        Args:
            folder: The folder.
            pattern: Which files.

        Raises:
            ModelError: `MODEL_NOT_FOUND`, a file is none of tensors.
        """
        from safetensors import SafetensorError, safe_open

        where: dict[str, str] = {}
        for path in sorted(folder.glob(pattern)):
            try:
                with safe_open(path, "pt") as file:
                    where |= dict.fromkeys(file.keys(), path.name)
            except SafetensorError:
                raise ModelError("MODEL_NOT_FOUND", "not a safetensors file", where=str(path)) from None
        return cls(folder, where)

    def names(self) -> list[str]:
        """Return the names of the tensors, sorted."""
        return sorted(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def get(self, name: str) -> torch.Tensor | None:
        """Return a tensor as float32, or None.

        Args:
            name: Its name.

        Raises:
            ModelError: `MODEL_MISMATCH`, it is packed.
        """
        from safetensors import safe_open

        if name not in self._where:
            return None
        with safe_open(self.folder / self._where[name], "pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        # Codes of 8 bits or fewer mean nothing without their scales, whatever their shape.
        if not found.is_floating_point() or found.element_size() < 2:
            raise _packed(name, f"it holds codes, {str(found.dtype).removeprefix('torch.')}")
        return found.float()


def _need_shape(tensor: torch.Tensor, shape: Sequence[int], name: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise _packed(name, f"its shape is {tuple(tensor.shape)} and not {tuple(shape)}")


def _packed(name: str, what: str) -> ModelError:
    fix = "dequantise the model first, to 16 or 32 bits; what was cut to another shape must be brought back to it"
    return ModelError("MODEL_MISMATCH", f"{name} cannot be read: {what}", where="MODEL", fix=fix)


@dataclass(frozen=True)
class AdapterSuspect:
    """An adapter by itself: its factors are the change of the base."""

    files: Files
    config: Mapping[str, Any]
    base: Files | None = None

    def has(self, site: MarkSite) -> bool:
        """Return whether the adapter has something at this site."""
        ends = (".lora_A.weight", *_SCALES)
        return any(f"{head}{site.name}{end}" in self.files for end in ends for head in (_PREFIX, ""))

    def product(self, site: MarkSite, left: torch.Tensor, right: torch.Tensor, reading: str) -> torch.Tensor:
        """Return u_j^T (s B A) v_j for each bit, (N,); an adapter has one reading."""
        if (factors := self._factors(site)) is None:
            return torch.zeros(len(left))
        a, b = factors
        return self.scaling(site.name, a.shape[0]) * ((left @ b) * (right @ a.T)).sum(1)

    def scale(self, site: MarkSite) -> torch.Tensor:
        """Return the change of a norm's scale, (R,)."""
        names = (f"{head}{site.name}{end}" for end in _SCALES for head in (_PREFIX, ""))
        own = next((found for name in names if (found := self.files.get(name)) is not None), None)
        base = self.base.get(f"{site.name}.weight") if self.base else None
        if own is None or base is None:
            return torch.zeros(site.rows)
        _need_shape(own, base.shape, f"{site.name}.weight")
        return own - base

    def times(self, site: MarkSite, right: torch.Tensor) -> torch.Tensor:
        """Return D X, (R, M), of the change D of a weight; `right` X is (K, M)."""
        if (factors := self._factors(site)) is None:
            return torch.zeros(site.rows, right.shape[1])
        a, b = factors
        return self.scaling(site.name, a.shape[0]) * (b @ (a @ right))

    def _factors(self, site: MarkSite) -> tuple[torch.Tensor, torch.Tensor] | None:
        names = [f"{_PREFIX}{site.name}.lora_{factor}.weight" for factor in "AB"]
        a, b = (self.files.get(name) for name in names)
        if a is None or b is None:
            return None
        rank = a.shape[0]
        _need_shape(a, (rank, site.columns), names[0])
        _need_shape(b, (site.rows, rank), names[1])
        return a, b

    def scaling(self, name: str, rank: int) -> float:
        """Return s of a site.

        Args:
            name: The site.
            rank: Its rank.
        """
        alpha = float(_of_pattern(self.config.get("alpha_pattern"), name, self.config.get("lora_alpha", rank)))
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


def _of_pattern(patterns: Any, name: str, default: Any) -> Any:
    # As PEFT does: the first pattern that fits the end of a module's name.
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


@dataclass(frozen=True)
class MergedSuspect:
    """A whole model, read against the base that it came from."""

    files: Files
    base: Files

    def has(self, site: MarkSite) -> bool:
        """Return whether the model has a weight of this name, packed or not."""
        return any(f"{site.name}.{end}" in self.files for end in ("weight", *_PACKED))

    def product(self, site: MarkSite, left: torch.Tensor, right: torch.Tensor, reading: str) -> torch.Tensor:
        """Return u_j^T D v_j for each bit, (N,)."""
        if (pair := self._pair(site)) is None:
            return torch.zeros(len(left))
        own, base = pair
        change = _rescaled(own, base) - base if reading == "rescaled" else own - base
        return ((left @ (change.T if site.transposed else change)) * right).sum(1)

    def times(self, site: MarkSite, right: torch.Tensor) -> torch.Tensor:
        """Return D X, (R, M), of the change D of a weight; `right` X is (K, M)."""
        if (pair := self._pair(site)) is None:
            return torch.zeros(site.rows, right.shape[1])
        own, base = pair
        return ((own - base).T if site.transposed else own - base) @ right

    def scale(self, site: MarkSite) -> torch.Tensor:
        """Return the change of a norm's scale, (R,)."""
        pair = self._pair(site)
        return torch.zeros(site.rows) if pair is None else pair[0] - pair[1]

    def _pair(self, site: MarkSite) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return a weight of the suspect and of the base."""
        own, base = (files.get(f"{site.name}.weight") for files in (self.files, self.base))
        for name in (f"{site.name}.{end}" for end in _PACKED):
            if self.files.get(name) is not None:
                raise _packed(name, "it is packed")
        if own is None or base is None:
            return None
        _need_shape(own, base.shape, f"{site.name}.weight")
        return own, base


def _rescaled(own: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Return a matrix with its rows and columns scaled so that it is as near as can be to the base's.

    Scales move between a norm and the linear layer after it, or between two layers, without a change of what the model
    computes. To undo that, rows and columns are fitted in turns by least squares; a low-rank change hardly moves them.
    """
    found = own.clone()
    for _ in range(_SWEEPS):
        for axis in (0, 1):
            fit = (found * base).sum(axis, keepdim=True) / found.square().sum(axis, keepdim=True).clamp_min(1e-30)
            found *= fit
    return found


def open_suspect(path: Path, base: Path | None) -> Suspect:
    """Return a suspect model.

    Args:
        path: An adapter's folder, a model's folder, or a run folder, whose adapter is meant.
        base: The base model's folder; a whole model, and norms, cannot be read without.

    Raises:
        ModelError: `MODEL_NOT_FOUND` or `MODEL_UNSAFE`; the base is missing.
    """
    folder = path / "adapter" if (path / "run.json").is_file() else path
    base_files = Files.of(_checked(base)) if base else None
    if (folder / CONFIG).is_file():
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return AdapterSuspect(Files.of(folder, WEIGHTS), config, base_files)
    files = Files.of(_checked(folder))
    if base_files is None:
        fix = "name the base model's folder with `--base`"
        raise ModelError("MODEL_NOT_FOUND", "a whole model is read against its base", where="--base", fix=fix)
    return MergedSuspect(files, base_files)


def _checked(folder: Path) -> Path:
    settings = ModelSettings(model_name_or_path=str(folder.resolve()))
    return find_base(settings, base_dir=folder)


def check_base(base: Path, expected: str) -> None:
    """Raise where a base model is not the one that a claim is on.

    Args:
        base: Its folder.
        expected: The claim's `base_digest`.

    Raises:
        ModelError: `MODEL_MISMATCH`.
    """
    found = base_digest(base)
    if found != expected:
        what = f"the base model has digest {found[:16]}..., and the claim is on {expected[:16]}..."
        raise ModelError("MODEL_MISMATCH", what, where=str(base), fix="name the base model of the claim's job")
