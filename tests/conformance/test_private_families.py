"""Private training for every family of decoders: at once where the model allows it, or one example after another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import DECODERS, save_family

from fedllm.data.batches import collate
from fedllm.data.tokens import TokenisedExample
from fedllm.models.adapter import TunableModel
from fedllm.models.load import load_base
from fedllm.models.loss import target_losses
from fedllm.models.settings import ModelSettings, PeftSettings
from fedllm.tasks import Task, TaskName
from fedllm.train.per_example import checked, one_by_one

# Their own code does not go with torch.func.
SLOW_WAY = ("bloom", "mixtral")
ROWS = [TokenisedExample(tuple(range(3, 3 + n)), (False, False, *[True] * (n - 2)), False, n) for n in (6, 9, 4)]


@pytest.mark.parametrize("family", DECODERS)
def test_each_example_has_the_gradient_that_it_has_by_itself(tmp_path: Path, family: str) -> None:
    folder = save_family(family, "causal_lm", tmp_path / family)
    model = load_base(ModelSettings(model_name_or_path=str(folder)), folder=folder).model
    tunable = TunableModel(model, PeftSettings(r=2, target_modules="all-linear"))
    draw = torch.Generator().manual_seed(2)
    tunable.write({name: 0.1 * torch.randn(spec.shape, generator=draw) for name, spec in tunable.manifest.items()})
    tunable.model.eval()
    way = checked(tunable.model, tunable.trainable, pad_id=0, example=ROWS[0])
    assert ("one_by_one" in way.__qualname__) == (family in SLOW_WAY)
    expected, found = one_by_one(tunable.model, tunable.trainable, pad_id=0)(ROWS), way(ROWS)
    for name, part in expected.items():
        assert float((found[name] - part).norm()) <= 1e-4 * float(part.norm()) + 1e-7


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "sequence_classification"), ("llama", "sequence_classification"), ("t5", "seq2seq_lm")],
)
def test_other_tasks_go_one_example_after_another(tmp_path: Path, family: str, task: TaskName) -> None:
    folder = save_family(family, task, tmp_path / family)
    labels = ("no", "yes") if task == "sequence_classification" else ()
    settings = ModelSettings(model_name_or_path=str(folder))
    model = load_base(settings, folder=folder, task=Task(task, labels)).model
    tunable = TunableModel(model, PeftSettings(r=2, target_modules="all-linear"), task)
    draw = torch.Generator().manual_seed(2)
    tunable.write({name: 0.1 * torch.randn(spec.shape, generator=draw) for name, spec in tunable.manifest.items()})
    tunable.model.eval()
    rows = [
        TokenisedExample(
            row.input_ids,
            tuple(not labels and wanted for wanted in row.loss_mask),
            False,
            0,
            apart=not labels,
            label=number % 2 if labels else None,
        )
        for number, row in enumerate(ROWS)
    ]
    found = checked(tunable.model, tunable.trainable, pad_id=0, example=rows[0])(rows)
    # In one batch: the mean over the examples of each one's mean.
    losses, row = target_losses(tunable.model, collate(rows, pad_id=0))
    each = torch.stack([losses[row == number].mean() for number in range(len(rows))])
    expected = torch.autograd.grad(each.mean(), list(tunable.trainable.values()))
    for name, part in zip(tunable.trainable, expected, strict=True):
        torch.testing.assert_close(found[name].mean(0), part, rtol=1e-4, atol=1e-6)
