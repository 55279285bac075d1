"""Private training for every family of decoders: at once where the model allows it, or one example after another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import DECODERS, save_family

from fedllm.data.tokens import TokenisedExample
from fedllm.models.adapter import TunableModel
from fedllm.models.load import load_base
from fedllm.models.settings import ModelSettings, PeftSettings
from fedllm.train.per_example import checked, one_by_one

# Their own code does not go with torch.func.
SLOW_WAY = ("gpt2", "bloom", "mixtral")
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
