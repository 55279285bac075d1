"""A transformer's blocks: where they are, and which of them an emulator's package lets others tune.

Shapes of offsite tuning: a model is a stack of blocks (an encoder with a decoder: two), cut into bottom, middle and
top. Bottom and top are the adapter layers, which others tune; the middle stays with the model's owner.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedllm.errors import ModelError

# The key of a package's config.json: path of a stack -> how many blocks are bottom and top.
CUT_KEY = "fedllm_cut"
_BLOCK = re.compile(r"(Layer|Block)$")


@dataclass(frozen=True)
class Cut:
    """How many blocks of a stack are adapter layers.

    Args:
        bottom: The first so many.
        top: The last so many.
    """

    bottom: int
    top: int

    def tuned(self, length: int) -> list[int]:
        """Return the indices of the adapter layers.

        Args:
            length: Blocks of the stack.
        """
        return [*range(self.bottom), *range(length - self.top, length)]

    def moved(self, index: int, *, length: int, to: int) -> int:
        """Return where an adapter layer is in a stack of another length.

        Args:
            index: Of the layer.
            length: Of its stack.
            to: Of the other one.
        """
        return index if index < self.bottom else index + to - length


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of blocks by their module's path: one, or encoder and decoder.

    Args:
        model: A transformer of any family.
    """
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or not _BLOCK.search(type(module[0]).__name__):
            continue
        # T5 keeps the parts of a block in a list of the same kind.
        if not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return found


def cuts_of(config: Any) -> dict[str, Cut]:
    """Return how a package's stacks are cut, by path; empty for a model that is no package.

    Args:
        config: The model's.
    """
    found = getattr(config, CUT_KEY, None) or {}
    return {path: Cut(int(cut["bottom"]), int(cut["top"])) for path, cut in found.items()}


def set_cuts(config: Any, cuts: Mapping[str, Cut]) -> None:
    """Note in a config how the stacks are cut: from then on only the adapter layers can be tuned.

    Args:
        config: The model's; it is changed.
        cuts: By path.
    """
    setattr(config, CUT_KEY, {path: {"bottom": cut.bottom, "top": cut.top} for path, cut in cuts.items()})


def forget_cuts(config: Any) -> None:
    """Take out of a config what it says of adapter layers: any layer can be tuned again.

    Args:
        config: The model's; it is changed.
    """
    if hasattr(config, CUT_KEY):
        delattr(config, CUT_KEY)


def tuned_prefixes(model: nn.Module) -> tuple[str, ...] | None:
    """Return the paths of the adapter layers, each with a dot at its end; None where any layer may be tuned.

    Args:
        model: A model of transformers.

    Raises:
        ModelError: `PEFT_TARGET`, the package names blocks that the model has not.
    """
    cuts = cuts_of(model.config)
    if not cuts:
        return None
    blocks = stacks(model)
    for path, cut in cuts.items():
        if path not in blocks or cut.bottom + cut.top > len(blocks[path]):
            what = f"the package's config cuts `{path}`, which the model has not in that size"
            raise ModelError("PEFT_TARGET", what, fix="build the package again with `fedllm emulator build`")
    return tuple(f"{path}.{index}." for path, cut in cuts.items() for index in cut.tuned(len(blocks[path])))


def in_tuned(name: str, prefixes: tuple[str, ...] | None) -> bool:
    """Return whether a module or parameter lies in a layer that may be tuned.

    Args:
        name: Its path.
        prefixes: From `tuned_prefixes`.
    """
    return prefixes is None or name.startswith(prefixes)


def renamed(name: str, places: Mapping[str, Mapping[int, int]]) -> str | None:
    """Return a tensor's name with its block's index changed; None where its block has no place.

    Args:
        name: Such as `base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight`.
        places: Path of a stack -> old index -> new index. Names outside the stacks stay.
    """
    for path, indices in places.items():
        found = re.search(rf"(?:^|\.){re.escape(path)}\.(\d+)(?=\.)", name)
        if found:
            index = indices.get(int(found[1]))
            return None if index is None else f"{name[: found.start(1)]}{index}{name[found.end(1) :]}"
    return name


def move_places(
    cuts: Mapping[str, Cut], lengths: Mapping[str, int], to: Mapping[str, int]
) -> dict[str, dict[int, int]]:
    """Return where the adapter layers of one model are in another that is cut alike, for `renamed`.

    Args:
        cuts: How both are cut.
        lengths: Blocks of the one, by path.
        to: Blocks of the other.
    """
    return {
        path: {i: cut.moved(i, length=lengths[path], to=to[path]) for i in cut.tuned(lengths[path])}
        for path, cut in cuts.items()
    }


def same_outside(one: nn.Module, other: nn.Module, cuts: Mapping[str, Cut]) -> list[str]:
    """Return the names of tensors outside of the middle that differ between two models that are cut alike.

    Args:
        one: A package's model.
        other: The owner's.
        cuts: How both are cut.
    """
    lengths, to = ({path: len(blocks) for path, blocks in stacks(model).items()} for model in (one, other))
    places = move_places(cuts, lengths, to)
    theirs = dict(other.state_dict())
    pairs = ((name, tensor, renamed(name, places)) for name, tensor in one.state_dict().items())
    return [name for name, tensor, new in pairs if new is not None and not _equal(tensor, theirs.get(new))]


def _equal(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape and torch.equal(tensor, other.to(tensor.dtype))


def inside(names: Iterable[str], prefixes: tuple[str, ...]) -> list[str]:
    """Return the names that lie in layers that may be tuned.

    Args:
        names: Paths.
        prefixes: From `tuned_prefixes`.
    """
    return [name for name in names if name.startswith(prefixes)]
