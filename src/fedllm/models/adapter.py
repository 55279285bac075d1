"""A base model with what is tuned of it; read and write its parameters by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedllm.models.adalora import budget, kept_values, penalty
from fedllm.models.blocks import forget_cuts
from fedllm.models.bottleneck import bottlenecks
from fedllm.models.branch import middle_branches, set_folded, without_folded
from fedllm.models.fresh import first_value, is_drawn
from fedllm.models.load import model_config
from fedllm.models.methods import attach
from fedllm.models.settings import OWN_TYPES, PROMPT_TYPES, PeftSettings
from fedllm.seeds import global_generators_kept
from fedllm.tasks import AUTO_CLASSES, CAUSAL_LM, LANGUAGE, Task, TaskName
from fedllm.wire.payload import Manifest, Tensors, manifest_of


class TunableModel:
    """A frozen base model with one tuning method on it, whose values are swapped in place.

    All parties in a process share it: what belongs to a party is only the values of `trainable`. Parameters are
    exchanged by name because PEFT's own state dict loses or resizes some of them (P-tuning, prefix projection).
    """

    def __init__(self, base_model: Any, peft: PeftSettings, task: TaskName = CAUSAL_LM) -> None:
        self.peft = peft
        self.model = attach(base_model, peft, task)
        self.trainable: dict[str, torch.nn.Parameter] = {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }
        self.manifest: Manifest = manifest_of(self.trainable)
        # What follows from the base. Kept, because one model may serve several runs, each from its start.
        self._given = {
            name: parameter.detach().clone()
            for name, parameter in self.trainable.items()
            if not is_drawn(name, peft.peft_type)
        }

    def read(self) -> Tensors:
        """Return copies of the trainable tensors on the CPU, by name."""
        return {name: self.trainable[name].detach().to("cpu", copy=True) for name in self.manifest}

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the trainable tensors in place, and what stands beside them (`folded/...`); names are of `manifest`."""
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[name])
        set_folded(self.model, tensors)

    def beside(self, rank: int) -> Manifest:
        """Return the tensors that may stand beside the middle of an emulator (`folded/...`); none in another model.

        Args:
            rank: Columns of each pair's left one, at most.
        """
        return middle_branches(self.model, rank)

    @contextmanager
    def only(self, names: Iterable[str]) -> Iterator[None]:
        """Train these tensors and no others, for as long as the context lasts.

        Args:
            names: Out of `manifest`.
        """
        fixed = [self.trainable[name] for name in self.trainable.keys() - set(names)]
        for parameter in fixed:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in fixed:
                parameter.requires_grad_(True)

    @contextmanager
    def shrunk(self, number: int, num_rounds: int) -> Iterator[None]:
        """Hold AdaLoRA's ranks at the round's budget, from the context's begin to its end; other methods have none.

        Args:
            number: The round, from 1 on.
            num_rounds: Rounds of the run.
        """
        masks: Tensors = {}
        if self.peft.peft_type == "ADALORA":
            masks = kept_values(self.trainable, budget(number, num_rounds, self.peft))
        self._multiply(masks)
        yield
        self._multiply(masks)

    def _multiply(self, masks: Tensors) -> None:
        with torch.no_grad():
            for name, mask in masks.items():
                self.trainable[name].mul_(mask.to(self.trainable[name].device))

    def penalty(self) -> torch.Tensor | None:
        """Return what the method adds to the training loss of a step, a scalar; None for most."""
        if self.peft.peft_type != "ADALORA" or not self.peft.orth_reg_weight:
            return None
        return penalty(self.trainable, self.peft.orth_reg_weight)

    @contextmanager
    def untuned(self) -> Iterator[Any]:
        """Yield the bare base model, as it was before it was tuned, for as long as the context lasts."""
        if self.peft.peft_type not in (*OWN_TYPES, *PROMPT_TYPES):
            with without_folded(self.model), self.model.disable_adapter():
                yield self.model
            return
        tuned, adapters = self.read(), bottlenecks(self.model)
        self.write(tuned | self._given)
        for adapter in adapters:
            adapter.active = False
        try:
            # Virtual tokens are put before the text by what PEFT wraps around the model.
            yield self.model.base_model if self.peft.peft_type in PROMPT_TYPES else self.model
        finally:
            for adapter in adapters:
                adapter.active = True
            self.write(tuned)

    def initial(self, seed: int) -> Tensors:
        """Return the first values of what is tuned, drawn from the job's seed alone.

        What PEFT computes from the base is kept (DoRA's magnitudes, modules to save), and so are the base's own
        parameters.

        Args:
            seed: The job's seed.
        """
        return {
            name: self._given[name].to("cpu", copy=True)
            if name in self._given
            else first_value(name, spec, self.peft.peft_type, seed=seed)
            for name, spec in self.manifest.items()
        }

    def num_trainable(self) -> int:
        """Return how many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trainable.values())


def skeleton(folder: Path, peft: PeftSettings, task: Task = LANGUAGE, *, all_layers: bool = False) -> TunableModel:
    """Return the model with what is tuned of it on the meta device: shapes and names, no weights.

    Args:
        folder: The base model's folder; only its config is read.
        peft: The tuning method.
        task: What the model is tuned to do.
        all_layers: Whether those of an emulator's middle may be named, too.
    """
    import transformers

    config = model_config(folder, task)
    if all_layers:
        forget_cuts(config)
    with torch.device("meta"), global_generators_kept():
        base_model = getattr(transformers, AUTO_CLASSES[task.name]).from_config(config)
        base_model.requires_grad_(False)
        return TunableModel(base_model, peft, task.name)
