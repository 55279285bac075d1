"""Fewer bytes for an update: shorter numbers, or fewer of them. What a codec loses, error feedback sends later."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedllm.seeds import stream
from fedllm.variants import with_own
from fedllm.wire.payload import Manifest, Tensors, TensorSpec

# Which settings a codec has, and what they are where the job does not say.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"error_feedback": False},
    "int8": {"block_size": 64, "error_feedback": False},
    "int4": {"block_size": 64, "error_feedback": False},
    "TopK": {"density": 0.1, "error_feedback": False},
    "RandomK": {"density": 0.1, "error_feedback": False},
    "Grid": {"bits": 16, "limit": None, "error_feedback": False},
}
# Positions cost 32 bits each, or a bit for every value.
_DENSE_ENOUGH_FOR_BITMAP = 1 / 32
_MARK = "#"


class CodecSettings(BaseModel):
    """In which form updates travel, and what becomes of what is lost."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: Literal["fp32", "bf16", "int8", "int4", "TopK", "RandomK", "Grid"] = Field("fp32", description="The codec.")
    block_size: int | None = Field(None, ge=8, le=4096, description="int8, int4: values that share a scale, 64.")
    density: float | None = Field(None, gt=0, le=1, description="TopK, RandomK: share of the values that is sent, 0.1.")
    bits: int | None = Field(None, ge=4, le=24, description="Grid: bits of a value, 16.")
    limit: float | None = Field(
        None, gt=0, description="Grid: the largest magnitude, best a power of 2; what is beyond is cut."
    )
    error_feedback: bool | None = Field(None, description="Whether a party adds what was lost to its next update: no.")

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_codec(cls, values: Any) -> Any:
        found = with_own(values, cls.model_fields, key="name", default="fp32", variants=_DEFAULTS)
        if isinstance(found, dict) and found.get("name") == "Grid" and found.get("limit") is None:
            raise ValueError("Grid needs limit, the largest magnitude of a value; set it")
        return found


Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Draws:
    """Random numbers for one tensor of one party's update: its own, and those that all parties draw alike."""

    own: np.random.Generator | None
    shared: Callable[[], np.random.Generator]


@dataclass(frozen=True)
class Codec:
    """Encodes and decodes named float32 tensors. The shapes of what travels follow from the settings alone."""

    settings: CodecSettings

    @property
    def is_plain(self) -> bool:
        """Whether tensors travel as they are."""
        return self.settings.name == "fp32"

    @property
    def step(self) -> float:
        """The step of the grid, of the codec Grid."""
        return _grid_step(self.settings)

    def manifest(self, manifest: Manifest) -> Manifest:
        """Return what travels for tensors of these names and shapes.

        Args:
            manifest: The tensors.
        """
        if self.is_plain:
            return manifest
        return {
            f"{name}{_MARK}{part}": spec
            for name, original in manifest.items()
            for part, spec in _FORMS[self.settings.name].parts(math.prod(original.shape), self.settings).items()
        }

    def encode(self, tensors: Tensors, *, seed: int, party: str, number: int) -> Tensors:
        """Return what travels.

        Values are rounded at random, so that their mean is the value; to the nearest where error feedback makes up
        for it.

        Args:
            tensors: The update.
            seed: The job's seed.
            party: The sender.
            number: The round.
        """
        if self.is_plain:
            return tensors
        form, found = _FORMS[self.settings.name], Tensors()
        for name, tensor in tensors.items():
            own = None if self.settings.error_feedback else stream(seed, "codec", party, number, name)
            draws = _Draws(own, _shared(seed, number, name))
            parts = form.encode(tensor.detach().to("cpu", torch.float32).reshape(-1), self.settings, draws)
            found |= {f"{name}{_MARK}{part}": value for part, value in parts.items()}
        return found

    def decode(
        self, parts: Mapping[str, torch.Tensor], manifest: Manifest, *, seed: int, number: int
    ) -> Mapping[str, torch.Tensor]:
        """Return the tensors, each decoded when it is looked at; what travelled under its own name is as it came.

        Args:
            parts: What travelled; its manifest has been checked.
            manifest: Of the tensors.
            seed: The job's seed.
            number: The round.
        """
        return parts if self.is_plain else _Decoded(self, parts, manifest, seed, number)


def _shared(seed: int, number: int, name: str) -> Callable[[], np.random.Generator]:
    return lambda: stream(seed, "random-k", number, name)


@dataclass(frozen=True, eq=False)
class _Decoded(Mapping[str, torch.Tensor]):
    codec: Codec
    coded: Mapping[str, torch.Tensor]
    manifest: Manifest
    seed: int
    number: int

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.coded:
            return self.coded[name]
        spec, settings = self.manifest[name], self.codec.settings
        form, size = _FORMS[settings.name], math.prod(spec.shape)
        parts = {part: self.coded[f"{name}{_MARK}{part}"] for part in form.parts(size, settings)}
        draws = _Draws(None, _shared(self.seed, self.number, name))
        return form.decode(parts, size, settings, draws).reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest)

    def __len__(self) -> int:
        return len(self.manifest)


@dataclass(frozen=True)
class _Form:
    """A codec's three functions, on flat float32 tensors of n values."""

    parts: Callable[[int, CodecSettings], Manifest]
    encode: Callable[[torch.Tensor, CodecSettings, _Draws], Parts]
    decode: Callable[[Parts, int, CodecSettings, _Draws], torch.Tensor]


def _spec(dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(dtype=dtype, shape=list(shape))


def _rounded(values: torch.Tensor, draws: _Draws) -> torch.Tensor:
    if draws.own is None:
        return values.round()
    noise = draws.own.random(values.numel(), dtype=np.float32)
    return (values + torch.from_numpy(noise).reshape(values.shape)).floor()


# Blocks: values share a scale, block by block.


def _levels(settings: CodecSettings) -> int:
    return 127 if settings.name == "int8" else 7


def _block_parts(size: int, settings: CodecSettings) -> Manifest:
    blocks = -(-size // (settings.block_size or 1))
    values = _spec("int8", size) if settings.name == "int8" else _spec("uint8", -(-size // 2))
    return {"values": values, "scales": _spec("bfloat16", blocks)}


def _block_encode(flat: torch.Tensor, settings: CodecSettings, draws: _Draws) -> Parts:
    size, block, levels = len(flat), settings.block_size or 1, _levels(settings)
    rows = torch.nn.functional.pad(flat, (0, -size % block)).reshape(-1, block)
    # A little more than the largest magnitude needs, so that rounding the scale to bfloat16 never makes it too small.
    scales = (rows.abs().amax(dim=1) * ((1 + 2.0**-8) / levels)).to(torch.bfloat16)
    wide = scales.float()[:, None]
    counts = _rounded(torch.where(wide > 0, rows / wide.clamp_min(torch.finfo(torch.float32).tiny), 0.0), draws)
    counts = counts.clamp(-levels, levels).reshape(-1)[:size].to(torch.int8)
    return {"values": counts if settings.name == "int8" else _nibbles(counts), "scales": scales}


def _nibbles(counts: torch.Tensor) -> torch.Tensor:
    shifted = torch.nn.functional.pad((counts + 8).to(torch.uint8), (0, len(counts) % 2)).reshape(-1, 2)
    return shifted[:, 0] | (shifted[:, 1] << 4)


def _block_decode(parts: Parts, size: int, settings: CodecSettings, draws: _Draws) -> torch.Tensor:
    values = parts["values"]
    if settings.name == "int4":
        values = torch.stack([values & 15, values >> 4], dim=1).reshape(-1)[:size].to(torch.int8) - 8
    scales = parts["scales"].float().repeat_interleave(settings.block_size or 1)[:size]
    return values.float() * scales


# bfloat16.


def _bf16_encode(flat: torch.Tensor, settings: CodecSettings, draws: _Draws) -> Parts:
    if draws.own is None:
        return {"values": flat.to(torch.bfloat16)}
    # The 16 bits that are cut off, as a number, decide at random whether the rest goes up by one.
    bits = flat.view(torch.int32)
    noise = torch.from_numpy(draws.own.integers(0, 2**16, len(flat), dtype=np.int32))
    up = (bits & 0xFFFF) + noise >= 2**16
    kept = (bits >> 16) + up.to(torch.int32)
    return {"values": kept.to(torch.int16).view(torch.bfloat16)}


def _bf16_decode(parts: Parts, size: int, settings: CodecSettings, draws: _Draws) -> torch.Tensor:
    return parts["values"].float()


# A part of the values.


def _kept(size: int, settings: CodecSettings) -> int:
    return max(1, round(size * (settings.density or 1.0))) if size else 0


def _top_parts(size: int, settings: CodecSettings) -> Manifest:
    kept = _kept(size, settings)
    if kept > size * _DENSE_ENOUGH_FOR_BITMAP:
        return {"values": _spec("float32", kept), "bitmap": _spec("uint8", -(-size // 8))}
    return {"values": _spec("float32", kept), "positions": _spec("int32", kept)}


def _top_encode(flat: torch.Tensor, settings: CodecSettings, draws: _Draws) -> Parts:
    kept = _kept(len(flat), settings)
    # Of equal magnitudes the first ones, on every machine.
    places = flat.abs().argsort(descending=True, stable=True)[:kept].sort().values
    parts = {"values": flat[places]}
    if "positions" in _top_parts(len(flat), settings):
        return parts | {"positions": places.to(torch.int32)}
    mask = np.zeros(len(flat), dtype=bool)
    mask[places.numpy()] = True
    return parts | {"bitmap": torch.from_numpy(np.packbits(mask))}


def _top_decode(parts: Parts, size: int, settings: CodecSettings, draws: _Draws) -> torch.Tensor:
    flat = torch.zeros(size)
    if "positions" in parts:
        places = parts["positions"].long().clamp(0, max(0, size - 1))
    else:
        found = np.unpackbits(parts["bitmap"].numpy(), count=size).nonzero()[0]
        places = torch.from_numpy(found)[: len(parts["values"])]
    flat[places] = parts["values"][: len(places)]
    return flat


def _random_places(size: int, settings: CodecSettings, draws: _Draws) -> torch.Tensor:
    if not size:
        return torch.zeros(0, dtype=torch.int64)
    return torch.from_numpy(np.sort(draws.shared().choice(size, _kept(size, settings), replace=False, shuffle=False)))


def _random_encode(flat: torch.Tensor, settings: CodecSettings, draws: _Draws) -> Parts:
    values = flat[_random_places(len(flat), settings, draws)]
    # Without error feedback the mean over the choices must be the value.
    return {"values": values if settings.error_feedback else values * (len(flat) / max(1, len(values)))}


def _random_decode(parts: Parts, size: int, settings: CodecSettings, draws: _Draws) -> torch.Tensor:
    flat = torch.zeros(size)
    flat[_random_places(size, settings, draws)] = parts["values"]
    return flat


# A grid that all parties share: integers on it add up, also where nobody may see one of them.


def _grid_most(settings: CodecSettings) -> int:
    return int(2 ** ((settings.bits or 2) - 1)) - 1


def _grid_step(settings: CodecSettings) -> float:
    # A power of two: then its multiples are exact, in sums too. No finer than what sums are rounded to.
    exact = (settings.limit or 1.0) / (_grid_most(settings) + 1)
    return float(2.0 ** max(math.ceil(math.log2(exact)), -30))


def _grid_parts(size: int, settings: CodecSettings) -> Manifest:
    bits = settings.bits or 0
    return {"values": _spec("int8" if bits <= 8 else "int16" if bits <= 16 else "int32", size)}


def _grid_encode(flat: torch.Tensor, settings: CodecSettings, draws: _Draws) -> Parts:
    step = _grid_step(settings)
    most = min(_grid_most(settings), math.floor((settings.limit or 1.0) / step))
    # 24 bits and a part of one are more than a float32 holds.
    counts = _rounded(flat.double() / step, draws).clamp(-most, most)
    return {"values": counts.to(getattr(torch, _grid_parts(len(flat), settings)["values"].dtype))}


def _grid_decode(parts: Parts, size: int, settings: CodecSettings, draws: _Draws) -> torch.Tensor:
    # Counts that are a sum already come in float64.
    values = parts["values"]
    return (values if values.dtype == torch.float64 else values.float()) * _grid_step(settings)


_FORMS = {
    "bf16": _Form(lambda size, settings: {"values": _spec("bfloat16", size)}, _bf16_encode, _bf16_decode),
    "int8": _Form(_block_parts, _block_encode, _block_decode),
    "int4": _Form(_block_parts, _block_encode, _block_decode),
    "TopK": _Form(_top_parts, _top_encode, _top_decode),
    "RandomK": _Form(
        lambda size, settings: {"values": _spec("float32", _kept(size, settings))}, _random_encode, _random_decode
    ),
    "Grid": _Form(_grid_parts, _grid_encode, _grid_decode),
}
