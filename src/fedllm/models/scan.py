"""Look for blocks of an owner's model in what others hold: the same tensor, nearly the same, or a quantised copy.

Shapes: S values of a secret matrix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fedllm.models.blocks import Cut, stacks
from fedllm.models.emulator import Slots
from fedllm.wire.payload import Tensors

# Two blocks of a trained model have cosines near 0. A copy in 4 bits, with scales that are not known, is above this.
NEAR = 0.8
_LEAST_VALUES = 64


@dataclass(frozen=True)
class Match:
    """A tensor that someone holds, and the secret one that it is like.

    Args:
        held: Its name there.
        secret: The secret one's name.
        how: `same`, or `near` with the cosine.
    """

    held: str
    secret: str
    how: str


def secret_tensors(model: torch.nn.Module, slots: Slots, cut: Cut) -> Tensors:
    """Return the tensors of the middle's blocks that no emulator was made of, by name.

    Args:
        model: The owner's.
        slots: Which blocks the emulator was made of.
        cut: Bottom and top.
    """
    found: Tensors = {}
    for path, blocks in stacks(model).items():
        for index in range(cut.bottom, len(blocks) - cut.top):
            if index not in slots[path]:
                found |= {f"{path}.{index}.{name}": p.detach() for name, p in blocks[index].named_parameters()}
    return found


def matches(held: Mapping[str, torch.Tensor], secret: Mapping[str, torch.Tensor], *, allowed: Tensors) -> list[Match]:
    """Return which of the tensors that someone holds are secret ones, whole or one beside the other in a longer one.

    Vectors are compared by digest alone: those of norms are alike in all blocks.

    Args:
        held: What someone holds, as it came: integers are read as codes of 8 or 4 bits.
        secret: From `secret_tensors`.
        allowed: What others may hold; what is equal to it is no secret.
    """
    known = {_digest(tensor) for tensor in allowed.values()}
    digests = {d: name for name, t in secret.items() if t.numel() > 1 and (d := _digest(t)) not in known}
    matrices = {name: t for name, t in secret.items() if t.dim() > 1 and t.numel() >= _LEAST_VALUES}
    units = {name: _unit(t) for name, t in matrices.items() if _digest(t) in digests}
    found = []
    for name, tensor in held.items():
        if (same := digests.get(_digest(tensor))) is not None:
            found.append(Match(name, same, "same"))
            continue
        found += [Match(name, other, f"near, cosine {value:.3f}") for other, value in _near(tensor, units)]
    return found


def _near(tensor: torch.Tensor, units: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
    for flat in _readings(tensor):
        for name, unit in units.items():
            for piece in _pieces(flat, unit.numel()):
                value = float(_normal(piece) @ unit)
                if abs(value) >= NEAR:
                    yield name, value
                    return


def _readings(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return a tensor's values in the ways they may be meant: row by row, column by column, as two codes in a byte."""
    flat = tensor.detach().cpu().float().reshape(-1)
    found = [flat]
    if tensor.dim() == 2:
        found.append(tensor.detach().cpu().float().t().reshape(-1))
    if tensor.dtype in (torch.uint8, torch.int8):
        whole = tensor.detach().cpu().reshape(-1).view(torch.uint8)
        low, high = (whole & 15).to(torch.int8) - 8, (whole >> 4).to(torch.int8) - 8
        found += [torch.stack(pair, dim=1).reshape(-1).float() for pair in ((low, high), (high, low))]
        if tensor.dtype == torch.uint8:
            found.append(flat - 128)
    return found


def _pieces(flat: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    if len(flat) % size == 0:
        yield from flat.reshape(-1, size)


def _unit(tensor: torch.Tensor) -> torch.Tensor:
    return _normal(tensor.detach().cpu().float().reshape(-1))


def _normal(flat: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(flat, dim=0)


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().float().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()
