"""FedOST's re-alignment: between rounds the owner goes on distilling the emulator, with what was tuned plugged in.

Source: Kuang et al. 2024, arXiv:2406.17706 (FedBiOT): the server distils the emulator on public data between
rounds, |h_full - h_emu|^2 + KL(p_full || p_emu), with the current adapter in both. Differs: not the emulator's weights
are trained, but a low-rank branch beside each linear layer of its middle, W + s L R, which goes down with the adapter;
the losses are those of the emulator's first distillation; and the owner's export policy has the last word.

Shapes: d rows and k columns of a weight, R the branch's rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from pydantic import Field

from fedllm.aggregate.folded import pairs, split
from fedllm.errors import ModelError
from fedllm.evaluate.loss import evaluate_examples
from fedllm.models.adapter import TunableModel
from fedllm.models.branch import middle_layers, scale_of, trained_branches
from fedllm.models.emulator_settings import EmulatorSettings
from fedllm.models.full import FullModel
from fedllm.models.scan import Match, matches, secret_tensors
from fedllm.scenarios.base import ClientContext, Row
from fedllm.scenarios.fedhomollm_rows import rows_of
from fedllm.seeds import stream
from fedllm.train.distil import Distillation, chosen, distance, distil, public_batches
from fedllm.wire.frame import check_manifest
from fedllm.wire.payload import Manifest, Payload, TensorMap, Tensors, TensorSpec

# On so many batches of public text the loss of distillation is told, before and after.
_LOOKS = 4
Refused = Literal["", "loss", "policy", "scan"]


class Realign(Payload):
    """Server -> owner: go on distilling the emulator, from this correction of it, with this adapter in both models."""

    adapter: TensorMap


class Realigned(Payload):
    """Owner -> server: the emulator's next correction.

    Where it came no closer, would break the owner's policy, or would hold a block that must not leave, there is none,
    and the last one stays. `losses` are those of distillation on public text, `before` and `after`.
    """

    correction: TensorMap
    losses: dict[str, float] = Field(default_factory=dict, max_length=2)
    refused: Refused = ""


@dataclass(frozen=True)
class Sides:
    """What the owner compares.

    Args:
        emulator: The package, with LoRA on its outer layers.
        whole: The whole model, with the same plugged in.
    """

    emulator: TunableModel
    whole: TunableModel


def check_correction(folded: Mapping[str, torch.Tensor], model: TunableModel, rank: int) -> None:
    """Return if what came beside an adapter is a correction of the middle of the emulator that is held, or nothing.

    Args:
        folded: What was received.
        model: The emulator.
        rank: Of the job's corrections; 0: there are none.

    Raises:
        PayloadError: `PAYLOAD_REFUSED`, such as for a block that the emulator has not, or for an outer layer.
    """
    check_manifest(folded, model.beside(rank) if folded and rank else {}, sender="server")


def first_correction(manifest: Manifest, seed: int) -> Tensors:
    """Return a correction that changes nothing: L is zero, R is drawn from the job's seed.

    Args:
        manifest: From `TunableModel.beside`.
        seed: The job's.
    """
    return {
        name: spec.zeros() if name.endswith(".left") else _drawn(name, spec, seed) for name, spec in manifest.items()
    }


def _drawn(name: str, spec: TensorSpec, seed: int) -> torch.Tensor:
    bound = spec.shape[1] ** -0.5
    return torch.from_numpy(stream(seed, "correction", name).uniform(-bound, bound, tuple(spec.shape))).float()


def realigned(context: ClientContext, request: Realign, *, full: FullModel, number: int, deadline: float) -> Realigned:
    """Return the owner's answer: the next correction, or why the last one stays.

    Args:
        context: The owner's.
        request: The adapter, and the last correction.
        full: Its whole model.
        number: The round.
        deadline: `time.monotonic()` at which to give up.

    Raises:
        RunFailed: `ROUND_TIMEOUT`.
        ModelError: The party file names no public text, or the emulator's middle has no linear layer.
    """
    adapter, before = split(request.adapter)
    manifest = context.model.beside(context.settings.correction_rank)
    if not manifest:
        raise ModelError("PEFT_TARGET", "the emulator's middle has no linear layer", where="federation.realign_every")
    how = _how(context, full, number, deadline)
    context.model.write({**adapter, **(before or first_correction(manifest, context.seed))})
    with full.plugged(adapter, context.model.model) as whole:
        sides = Sides(context.model, whole)
        correction, losses = _distilled(context, sides, how)
        context.log(number, "realigned", {f"distil_loss_{name}": value for name, value in losses.items()})
        refused: Refused = ""
        if not losses["after"] <= losses["before"]:
            refused = "loss"
        elif found := held_by(correction, sides, context, full=full):
            context.log(number, "realigned", {"blocks_found": len(found)})
            refused = "scan"
        elif not _is_allowed(context, sides, adapter, correction, number):
            refused = "policy"
    told = {name: value for name, value in losses.items() if math.isfinite(value)}
    return Realigned(correction={} if refused else correction, losses=told, refused=refused)


def _emulator_settings(context: ClientContext) -> EmulatorSettings:
    if context.emulator is None or not context.public:
        what = "this site is the owner's, and its party file names no public text to distil on"
        fix = "write `public` into the section `emulator` of party.yaml"
        raise ModelError("MODEL_NOT_FOUND", what, where=f"party {context.party}", fix=fix)
    return context.emulator


def _how(context: ClientContext, full: FullModel, number: int, deadline: float) -> Distillation:
    settings = _emulator_settings(context)
    return Distillation(
        context.settings.correction_steps,
        settings.distil_learning_rate,
        settings.distil_batch_size,
        settings.hidden_weight,
        settings.logit_weight,
        full.cut,
        context.seed,
        label=f"realignment {number}",
        deadline=deadline,
    )


def _distilled(context: ClientContext, sides: Sides, how: Distillation) -> tuple[Tensors, dict[str, float]]:
    """Return the correction after so many steps from the one that the emulator has, and the losses around them."""
    public, pad_id = context.public, context.pad_id
    student, teacher = sides.emulator.model.eval(), sides.whole.model

    def told() -> float:
        batches = public_batches(public[: _LOOKS * how.batch_size], pad_id=pad_id, batch_size=how.batch_size)
        return fmean(distance(student, teacher, batch, how=how) for batch in batches)

    with sides.emulator.only(()), trained_branches(student) as factors:
        before = told()
        distil(student, teacher, public, how=how, tuned=list(factors.values()), pad_id=pad_id)
        after = told()
        correction = {name: factor.detach().to("cpu", copy=True) for name, factor in factors.items()}
    return correction, {"before": before, "after": after}


def _is_allowed(context: ClientContext, sides: Sides, adapter: Tensors, correction: Tensors, number: int) -> bool:
    """Return whether the corrected emulator keeps to the rules of the export policy that a round can look at.

    As it is it must stay worse than the whole model (Emu-ZS, Full-ZS), and tuned worse than the plugged one (OT-Emu,
    Plug), each by the policy's margin, on the held-out part of the probe set.
    """
    policy, model = _emulator_settings(context).policy, sides.emulator

    def loss(of: Any) -> float:
        size, examples = context.eval_batch_size, context.data.held_out
        return evaluate_examples(of, examples, pad_id=context.pad_id, batch_size=size).loss_nats

    model.write({**model.initial(context.seed), **correction})
    emu_zs = loss(model.model)
    model.write({**adapter, **correction})
    ot_emu, plug = loss(model.model), loss(sides.whole.model)
    with sides.whole.untuned() as bare:
        full_zs = loss(bare)
    found = {"emu_zs": emu_zs, "full_zs": full_zs, "ot_emu": ot_emu, "plug": plug}
    context.log(number, "realigned", {f"{name}_nats": value for name, value in found.items()})
    return emu_zs - full_zs > policy.full_zs_margin and ot_emu - plug > policy.plug_margin


def held_by(correction: Tensors, sides: Sides, context: ClientContext, *, full: FullModel) -> list[Match]:
    """Return which blocks that must not leave can be read off a correction, as it is or with the weights beside it.

    Looked at are its factors, the middle's weights as they become, and what they are changed by: that must neither be
    like a weight that is left out, nor like the way from the one that is there to it.

    Args:
        correction: What would be sent.
        sides: Emulator and whole model.
        context: The owner's.
        full: The whole model.
    """
    bare: Any = sides.whole.model.get_base_model()
    with sides.whole.untuned():
        # Blocks are chosen as they were for the package.
        slots = chosen(bare, full.cut, _emulator_settings(context), context.public, pad_id=context.pad_id)
    secret = secret_tensors(bare, slots, full.cut)
    allowed = {name: tensor for name, tensor in bare.state_dict().items() if name not in secret}
    found = matches(correction, secret, allowed=allowed)
    for site, weight, change in _changes(correction, sides.emulator):
        held = {site: weight + change, f"{site}, its change": change}
        found += matches(held, secret, allowed=allowed)
        ways = {f"the way to {name}": tensor - weight for name, tensor in _like(site, weight, secret)}
        found += matches({f"{site}, its change": change}, ways, allowed={})
    return found


def _changes(correction: Tensors, model: TunableModel) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (site, weight, what it is changed by) of the middle, as the weight is stored."""
    layers, scale = middle_layers(model.model), scale_of(model.model)
    for site, (left, right) in pairs(correction):
        layer, change = layers[site], scale * (left @ right)
        weight = layer.get_parameter("weight").detach().cpu().float()
        yield site, weight, change if isinstance(layer, torch.nn.Linear) else change.t()


def _like(site: str, weight: torch.Tensor, secret: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the secret weights that have in their blocks the place that this one has in its own."""
    place = re.split(r"\.\d+\.", site, maxsplit=1)[-1]
    for name, tensor in secret.items():
        if name.endswith(f".{place}.weight") and tensor.shape == weight.shape:
            yield name, tensor.detach().cpu().float()


def rows_after(number: int, answer: Realigned) -> list[Row]:
    """Return what a re-alignment came to, as rows: `realigned` is 1, or 0 where the last correction stays.

    Args:
        number: The round.
        answer: The owner's.
    """
    values = {f"distil_loss_{name}": answer.losses[name] for name in ("before", "after") if name in answer.losses}
    values["realigned"] = float(not answer.refused)
    if answer.refused:
        values[f"realign_refused_by_{answer.refused}"] = 1.0
    return rows_of(number, None, None, values)
