"""Emulators: a smaller model in the place of the owner's, with the same outer layers and another middle.

Source: Xiao et al. 2023, arXiv:2302.04870 (Offsite-Tuning), section 3; Men et al. 2024, arXiv:2403.03853 (ShortGPT),
equation 1; Zhang et al. 2023, arXiv:2310.15477 (CRaSh), section 3. Differs: CRaSh's clusters are merged by the cosine
of blocks' outputs, and hold neighbours only.

Shapes: L blocks of a stack, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedllm.errors import ConfigError, ModelError
from fedllm.models.blocks import Cut, renamed, set_cuts, stacks
from fedllm.models.loss import target_logits
from fedllm.seeds import global_generators_kept

# Path of a stack -> for each block of the smaller stack, which block of the whole one stands there.
Slots = dict[str, list[int]]
_MAX_TOKENS = 512
# Families with two stacks: path -> the config's key for its length. Others have `num_hidden_layers`.
_T5 = {"encoder.block": "num_layers", "decoder.block": "num_decoder_layers"}
_BART = {"model.encoder.layers": "encoder_layers", "model.decoder.layers": "decoder_layers"}
_LENGTHS: dict[str, dict[str, str]] = {"t5": _T5, "mt5": _T5, "bart": _BART, "mbart": _BART}
# Lists in a config with an entry for each block.
_PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")


@dataclass(frozen=True)
class Profile:
    """What blocks do with some text.

    Args:
        influence: Of each block, 1 - cosine of what goes in and what comes out, mean over tokens, shape (L,).
        likeness: Cosine of each two blocks' outputs, mean over tokens, shape (L, L).
    """

    influence: torch.Tensor
    likeness: torch.Tensor


def uniform(middle: Sequence[int], keep: int, profile: Profile | None) -> list[int]:
    """Return evenly spaced blocks: number i is round(i (|E| - 1) / (n - 1)), of Offsite-Tuning; of one, the central.

    Args:
        middle: The blocks between bottom and top, |E| of them.
        keep: How many to keep, n.
        profile: Not looked at.
    """
    if keep == 1:
        return [middle[len(middle) // 2]]
    return [middle[round(i * (len(middle) - 1) / (keep - 1))] for i in range(keep)]


def influence(middle: Sequence[int], keep: int, profile: Profile | None) -> list[int]:
    """Return the blocks that change their input the most, in order.

    Args:
        middle: As for `uniform`.
        keep: As for `uniform`.
        profile: Of the whole stack.
    """
    found = _measured(profile).influence
    return sorted(sorted(middle, key=lambda index: (-float(found[index]), index))[:keep])


def crash(middle: Sequence[int], keep: int, profile: Profile | None) -> list[int]:
    """Return as many blocks as the middle has: each cluster's central block, in the places of all of its cluster.

    Args:
        middle: As for `uniform`.
        keep: How many clusters, and blocks that differ.
        profile: Of the whole stack.
    """
    likeness = _measured(profile).likeness
    clusters = [[index] for index in middle]

    def between(place: int) -> float:
        pair = likeness[clusters[place]][:, clusters[place + 1]]
        return float(pair.mean())

    while len(clusters) > keep:
        place = max(range(len(clusters) - 1), key=lambda at: (between(at), -at))
        clusters[place : place + 2] = [clusters[place] + clusters[place + 1]]
    central = [max(cluster, key=lambda index: (float(likeness[index, cluster].sum()), -index)) for cluster in clusters]
    return [index for index, cluster in zip(central, clusters, strict=True) for _ in cluster]


def whole(middle: Sequence[int], keep: int, profile: Profile | None) -> list[int]:
    """Return all blocks of the middle: no emulator at all, for tests and for models that are no secret.

    Args:
        middle: The blocks between bottom and top.
        keep: Not looked at.
        profile: Not looked at.
    """
    return list(middle)


WAYS: dict[str, Callable[[Sequence[int], int, Profile | None], list[int]]] = {
    "uniform": uniform,
    "influence": influence,
    "crash": crash,
    "whole": whole,
}
MEASURED_WAYS = ("influence", "crash")


def _measured(profile: Profile | None) -> Profile:
    if profile is None:
        raise ValueError("this way needs a profile of the blocks")
    return profile


def choose(
    model: nn.Module, cut: Cut, *, way: str, keep: int | None = None, profiles: Mapping[str, Profile] | None = None
) -> Slots:
    """Return which blocks of a model stand in its emulator.

    Args:
        model: The owner's.
        cut: Its bottom and top, the same in each stack.
        way: One of `WAYS`.
        keep: Blocks to keep of each middle; None: half of them, rounded up.
        profiles: From `profile`, for the ways that need it.

    Raises:
        ConfigError: `BAD_VALUE`, the model has too few blocks.
    """
    slots: Slots = {}
    for path, blocks in stacks(model).items():
        length = len(blocks)
        middle = range(cut.bottom, length - cut.top)
        count = keep or -(-len(middle) // 2)
        if not len(middle) or count > len(middle):
            what = f"{path} has {length} blocks: between {cut.bottom} and {cut.top} are fewer than {max(count, 1)}"
            raise ConfigError("BAD_VALUE", what, where="emulator", fix="lower `bottom`, `top` or `middle`")
        chosen = WAYS[way](middle, count, (profiles or {}).get(path))
        slots[path] = [*range(cut.bottom), *chosen, *range(length - cut.top, length)]
    if not slots:
        raise ModelError("PEFT_TARGET", "no list of transformer blocks was found in the model", where="emulator")
    return slots


@torch.no_grad()
def profile(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Profile]:
    """Return what each stack's blocks do with some text, by path.

    Args:
        model: The owner's, in evaluation mode.
        batches: As for `target_logits`; of their tokens the first few hundred are looked at.
    """
    seen: dict[str, list[list[torch.Tensor]]] = {
        path: [[] for _ in range(len(b) + 1)] for path, b in stacks(model).items()
    }
    with ExitStack() as hooks:
        for path, blocks in stacks(model).items():
            for place, block in enumerate(blocks):
                hooks.callback(_watch(block, seen[path], place).remove)
        for batch in batches:
            if _num_tokens(seen) >= _MAX_TOKENS:
                break
            target_logits(model, batch)
    return {path: _profile([torch.cat(parts)[:_MAX_TOKENS] for parts in found]) for path, found in seen.items()}


def _watch(block: nn.Module, seen: list[list[torch.Tensor]], place: int) -> Any:
    def note(_: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        if place == 0:
            given = inputs[0] if inputs else named["hidden_states"]
            seen[0].append(given.float().flatten(0, -2).cpu())
        found = output[0] if isinstance(output, tuple) else output
        seen[place + 1].append(found.float().flatten(0, -2).cpu())

    return block.register_forward_hook(note, with_kwargs=True)


def _num_tokens(seen: Mapping[str, list[list[torch.Tensor]]]) -> int:
    return min(sum(len(part) for part in found[-1]) for found in seen.values())


def _profile(states: list[torch.Tensor]) -> Profile:
    units = torch.stack([nn.functional.normalize(state, dim=-1) for state in states])
    change = 1 - (units[1:] * units[:-1]).sum(-1).mean(-1)
    return Profile(change, torch.einsum("itd,jtd->ij", units[1:], units[1:]) / units.shape[1])


def sliced(model: Any, slots: Slots, cut: Cut) -> Any:
    """Return a new model with the blocks that `slots` names, in evaluation mode; its config says how it is cut.

    It is made from its own config and filled by name, so that indices of layers, caches and tied weights are those of
    a model of its size.

    Args:
        model: The owner's; it is left as it is.
        slots: From `choose`.
        cut: Bottom and top.

    Raises:
        ModelError: `PEFT_TARGET`, blocks of this family cannot be left out.
    """
    config = _config_of(model, slots)
    set_cuts(config, dict.fromkeys(slots, cut))
    with global_generators_kept():
        made = type(model)(config).to(next(model.parameters()).dtype)
    places = {path: dict(enumerate(indices)) for path, indices in slots.items()}
    theirs = model.state_dict()
    made.load_state_dict({name: theirs[str(renamed(name, places))] for name in made.state_dict()})
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.requires_grad_(False).eval()


def _config_of(model: Any, slots: Slots) -> Any:
    family, values = model.config.model_type, model.config.to_dict()
    names = _LENGTHS.get(family) or (dict.fromkeys(slots, "num_hidden_layers") if len(slots) == 1 else {})
    if set(names) != set(slots):
        what = f"it is not known how many blocks {family} has where ({', '.join(slots)})"
        raise ModelError("PEFT_TARGET", what, where="emulator", fix="use a decoder, T5 or BART")
    if values.get("scale_attn_by_inverse_layer_idx"):
        what = "a block's attention depends on its place (`scale_attn_by_inverse_layer_idx`)"
        raise ModelError("PEFT_TARGET", what, where="emulator", fix="use another base model")
    if family in ("t5", "mt5") and any(indices[0] != 0 for indices in slots.values()):
        what = "the first block of T5 holds the positions of all, so it cannot be left out"
        raise ModelError("PEFT_TARGET", what, where="emulator.bottom", fix="set `bottom` to 1 or more")
    for path, indices in slots.items():
        values[model.config.attribute_map.get(names[path], names[path])] = len(indices)
        for key in _PER_BLOCK:
            if isinstance(values.get(key), list):
                values[key] = [values[key][index] for index in indices]
    config = type(model.config).from_dict(values)
    config._attn_implementation = model.config._attn_implementation
    return config


def middle_parameters(model: nn.Module, cut: Cut) -> dict[str, nn.Parameter]:
    """Return the parameters of an emulator's middle, by name.

    Args:
        model: A package's model.
        cut: Bottom and top.
    """
    found: dict[str, nn.Parameter] = {}
    for path, blocks in stacks(model).items():
        for index in range(cut.bottom, len(blocks) - cut.top):
            found |= {f"{path}.{index}.{name}": value for name, value in blocks[index].named_parameters()}
    return found


def share_repeated(model: nn.Module, slots: Slots) -> None:
    """Let blocks that stand in several places have one set of parameters, so that they stay equal when trained.

    Args:
        model: From `sliced`.
        slots: What it was made of.
    """
    for path, indices in slots.items():
        blocks = stacks(model)[path]
        for place, index in enumerate(indices):
            first = indices.index(index)
            if first == place:
                continue
            theirs = dict(blocks[first].named_parameters())
            for name in theirs:
                owner, _, leaf = name.rpartition(".")
                setattr(blocks[place].get_submodule(owner), leaf, theirs[name])
