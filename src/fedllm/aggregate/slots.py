"""Parties of different rank: who owns which slots of LoRA's factors, and what the mean of a slot is.

A slot is a row of A with the column of B that it is multiplied with. A party of rank r_i owns the first r_i.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from fedllm.wire.payload import Manifest, TensorSpec

Tensors = dict[str, torch.Tensor]
# Under this name an answer says which slots its party owns, as ones and zeros.
OWNED = "slots"

_ROWS = re.compile(r"\.lora_(embedding_)?A\.")
_COLUMNS = re.compile(r"\.lora_(embedding_)?B\.")


def slot_axis(name: str) -> int | None:
    """Return the dimension along which a tensor's slots lie, or None for what is no LoRA factor.

    Args:
        name: The tensor's.
    """
    return 0 if _ROWS.search(name) else 1 if _COLUMNS.search(name) else None


def num_slots(manifest: Manifest) -> int:
    """Return the rank of an adapter; 0 if it has no LoRA factor.

    Args:
        manifest: Its tensors.
    """
    found = (spec.shape[axis] for name, spec in manifest.items() if (axis := slot_axis(name)) is not None)
    return next(found, 0)


def own_manifest(manifest: Manifest, rank: int) -> Manifest:
    """Return the manifest of a party's slots alone.

    Args:
        manifest: The whole adapter's, or a part of it.
        rank: The party's.
    """
    own = dict(manifest)
    for name, spec in manifest.items():
        if (axis := slot_axis(name)) is not None:
            shape = [*spec.shape[:axis], rank, *spec.shape[axis + 1 :]]
            own[name] = TensorSpec(dtype=spec.dtype, shape=shape)
    return own


def own_slots(tensors: Mapping[str, torch.Tensor], rank: int) -> Tensors:
    """Return a party's slots alone; what has no slots, whole.

    Args:
        tensors: Of the whole adapter's shapes.
        rank: The party's.
    """
    return {name: _first(name, tensor, rank) for name, tensor in tensors.items()}


def _first(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    axis = slot_axis(name)
    return tensor if axis is None else tensor.narrow(axis, 0, rank).contiguous()


def without_others(tensors: Mapping[str, torch.Tensor], rank: int) -> Tensors:
    """Return the adapter as a party of a lower rank takes it: the slots that it does not own are zero.

    With a row of A and its column of B both zero, neither has a gradient, and weight decay leaves them at zero: such a
    slot stays out of the party's training by itself.

    Args:
        tensors: The whole adapter.
        rank: The party's.
    """
    return widened(own_slots(tensors, rank), tensors)


def widened(tensors: Mapping[str, torch.Tensor], whole: Mapping[str, torch.Tensor]) -> Tensors:
    """Return a party's slots in the shapes of the whole adapter; the slots that it does not own are zero.

    Args:
        tensors: The party's slots alone.
        whole: Tensors of the whole adapter's shapes, with these names among theirs.
    """
    return {name: _widened(name, tensor, _size(name, whole[name])) for name, tensor in tensors.items()}


def _size(name: str, tensor: torch.Tensor) -> int:
    axis = slot_axis(name)
    return 0 if axis is None else tensor.shape[axis]


def _widened(name: str, tensor: torch.Tensor, size: int) -> torch.Tensor:
    axis = slot_axis(name)
    if axis is None or tensor.shape[axis] == size:
        return tensor
    missing = [*tensor.shape[:axis], size - tensor.shape[axis], *tensor.shape[axis + 1 :]]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=axis)


@dataclass(frozen=True, eq=False)
class Spread(Mapping[str, torch.Tensor]):
    """An answer as it is summed: slots that its party does not own are zero, and `OWNED` says which those are.

    Each tensor is made when it is looked at.

    Args:
        tensors: The party's slots alone.
        rank: The party's.
        size: The adapter's rank.
    """

    tensors: Mapping[str, torch.Tensor]
    rank: int
    size: int

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == OWNED:
            return (torch.arange(self.size) < self.rank).float()
        return _widened(name, self.tensors[name], self.size)

    def __iter__(self) -> Iterator[str]:
        yield from self.tensors
        yield OWNED

    def __len__(self) -> int:
        return len(self.tensors) + 1


def slot_means(means: Mapping[str, torch.Tensor]) -> Tensors:
    """Return means in which a slot's is over the parties that own it; 0 where none of them answered.

    The mean over all parties, in which a slot that is not owned counts as zero, is divided by the share of the weight
    that owns it. So a sum is enough: sum_i p_i x_i / sum_i p_i [i owns the slot].

    Source: the zero padding of HetLoRA, Cho et al. 2024, arXiv:2401.06432. Differs: there the zeros count,
    which pulls the slots that few own towards zero; and each party weighs by its data, not by its factors' norm.

    Args:
        means: Of `Spread` answers. Without `OWNED` among them all own all slots, and they are returned as they are.
    """
    if OWNED not in means:
        return dict(means)
    owned = means[OWNED].double()
    return {name: _divided(name, mean, owned) for name, mean in _others(means)}


def _others(means: Mapping[str, torch.Tensor]) -> Iterable[tuple[str, torch.Tensor]]:
    return ((name, mean) for name, mean in means.items() if name != OWNED)


def _divided(name: str, mean: torch.Tensor, owned: torch.Tensor) -> torch.Tensor:
    axis = slot_axis(name)
    if axis is None:
        return mean
    shares = owned.reshape([-1 if dim == axis else 1 for dim in range(mean.dim())])
    return torch.where(shares > 0, mean.double() / shares.clamp_min(1e-300), 0.0).float()
