"""Every tuning method with every family and task, and what is promised of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families import ENCODERS, FAMILIES, TASKS

from fedllm.errors import ModelError
from fedllm.models.adapter import skeleton
from fedllm.models.settings import PeftSettings
from fedllm.tasks import CAUSAL_LM, CLASSIFICATION, Task, TaskName

LABELS = ("complaint", "question", "praise")
# Name in the table -> settings, small enough for a tiny model.
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"peft_type": "LORA", "r": 2},
    "rsLoRA": {"peft_type": "LORA", "r": 2, "use_rslora": True},
    "DoRA": {"peft_type": "LORA", "r": 2, "use_dora": True},
    # Which module: `saved_module`.
    "LoRA, saved": {"peft_type": "LORA", "r": 2},
    "AdaLoRA": {"peft_type": "ADALORA", "init_r": 4, "target_r": 2},
    "VeRA": {"peft_type": "VERA", "r": 4},
    "IA3": {"peft_type": "IA3"},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
    "prefix, projected": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "prefix_projection": True},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
    "P-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 3},
    "norms": {"peft_type": "LN_TUNING"},
    "Pfeiffer": {"peft_type": "BOTTLENECK", "bottleneck_size": 4},
    "Houlsby": {"peft_type": "BOTTLENECK", "bottleneck_size": 4, "placement": "houlsby"},
    "BitFit": {"peft_type": "BITFIT"},
    "full": {"peft_type": "FULL"},
}
# Families whose output layer has the weights of their embeddings, where neither may be saved.
_TIED = ("gpt2", "gemma", "gemma2", "gemma3_text", "opt", "bloom")
_EMBEDDINGS = {"gpt2": "wte", "gpt_neox": "embed_in", "bloom": "word_embeddings"} | dict.fromkeys(
    ENCODERS, "word_embeddings"
)


def saved_module(family: str, task: TaskName) -> str:
    """Return what is trained whole beside LoRA: the output layer where it has weights of its own, else the embeddings.

    Args:
        family: A key of `FAMILIES`.
        task: What the model is for.
    """
    if task == CAUSAL_LM and family not in _TIED:
        return "lm_head"
    return _EMBEDDINGS.get(family, "embed_tokens")


@dataclass(frozen=True)
class Combination:
    """A method on a family for a task."""

    method: str
    family: str
    task: TaskName

    @property
    def settings(self) -> dict[str, Any]:
        """The job's `peft` section."""
        saved = {"modules_to_save": [saved_module(self.family, self.task)]} if self.method == "LoRA, saved" else {}
        return METHODS[self.method] | saved

    @property
    def peft(self) -> PeftSettings:
        """The method's settings."""
        return PeftSettings.model_validate(self.settings)

    @property
    def whole_task(self) -> Task:
        """The task with its labels."""
        return Task(self.task, LABELS if self.task == CLASSIFICATION else ())

    def refusal(self, base: Path) -> str | None:
        """Return why the combination is refused before anything is loaded; None if it is allowed.

        Args:
            base: The folder of a model of the family.
        """
        try:
            skeleton(base, self.peft, self.whole_task)
        except ModelError as error:
            assert (error.code, bool(error.fix)) == ("PEFT_TARGET", True)
            return error.what
        return None


def combinations() -> Iterator[Combination]:
    """Yield all of them."""
    for task, families in TASKS.items():
        for family in families:
            for method in METHODS:
                yield Combination(method, family, task)


def sample(every: int) -> Iterator[Combination]:
    """Yield about one in so many, in which each method, and each family with each of its tasks, comes up.

    Args:
        every: 1 for all.
    """
    methods, families = list(METHODS), list(FAMILIES)
    for one in combinations():
        place = methods.index(one.method) + 3 * families.index(one.family) + 5 * list(TASKS).index(one.task)
        if place % every == 0:
            yield one
