"""The owner's whole model: opened to plug in what others tuned on its emulator, and let go of afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedllm.errors import ModelError
from fedllm.models.adapter import TunableModel
from fedllm.models.blocks import Cut, move_places, renamed, same_outside, set_cuts, stacks
from fedllm.models.load import Base, load_base
from fedllm.models.settings import ModelSettings, PeftSettings
from fedllm.tasks import LANGUAGE, Task
from fedllm.wire.payload import Tensors


@dataclass(frozen=True)
class FullModel:
    """Where the whole model is, and how others tune its outer layers.

    Args:
        folder: From `find_base`.
        cut: Bottom and top.
        settings: The job's `model` section.
        peft: Its `peft` section.
        task: What the model is tuned to do.
        device: Of the owner's party file.
    """

    folder: Path
    cut: Cut
    settings: ModelSettings
    peft: PeftSettings
    task: Task = LANGUAGE
    device: str = "cpu"

    def load(self) -> Base:
        """Return the whole model, frozen, of which only the outer layers can be tuned."""
        # The job's digest is the package's.
        settings = self.settings.model_copy(update={"base_digest": None})
        base = load_base(settings, folder=self.folder, device=self.device, task=self.task)
        set_cuts(base.model.config, dict.fromkeys(stacks(base.model), self.cut))
        return base

    @contextmanager
    def plugged(self, adapter: Mapping[str, torch.Tensor], emulator: torch.nn.Module) -> Iterator[TunableModel]:
        """Yield the whole model with what was tuned on the emulator, for as long as the context lasts.

        Args:
            adapter: By the emulator's names.
            emulator: The package's model, tuned or not.

        Raises:
            ModelError: `MODEL_MISMATCH`, the package was made of another model.
        """
        base = self.load()
        lengths = lengths_of(emulator)
        tunable = TunableModel(base.model, self.peft, self.task.name)
        try:
            tunable.write(plugged(adapter, lengths, lengths_of(base.model), self.cut))
            yield tunable
        finally:
            del tunable, base

    def check_package(self, package: torch.nn.Module) -> None:
        """Raise where a package's outer layers are not those of the whole model.

        Args:
            package: Its model, untuned.

        Raises:
            ModelError: `MODEL_MISMATCH`.
        """
        different = same_outside(package, self.load().model, dict.fromkeys(stacks(package), self.cut))
        if different:
            raise ModelError(
                "MODEL_MISMATCH",
                f"the package and the whole model differ outside of the middle, in {different[0]} for one",
                where="emulator.full_model_name_or_path",
                fix="build the package again with `fedllm emulator build JOB`",
            )


def lengths_of(model: torch.nn.Module) -> dict[str, int]:
    """Return how many blocks each stack of a model has, by the path that it has without what PEFT wraps around.

    Args:
        model: A model of transformers, tuned or not.
    """
    find: Any = getattr(model, "get_base_model", None)
    inner: torch.nn.Module = find() if find else model
    return {path: len(blocks) for path, blocks in stacks(inner).items()}


def plugged(
    adapter: Mapping[str, torch.Tensor], lengths: Mapping[str, int], to: Mapping[str, int], cut: Cut
) -> Tensors:
    """Return tensors that were tuned on an emulator under the names that they have in the whole model.

    Args:
        adapter: By the emulator's names.
        lengths: Blocks of the emulator's stacks, by path.
        to: Blocks of the whole model's.
        cut: Bottom and top of both.
    """
    places = move_places(dict.fromkeys(lengths, cut), lengths, to)
    return {str(renamed(name, places)): tensor for name, tensor in adapter.items()}
