"""Classifiers on a base in 8 or 4 bits: the head is drawn, trained and delivered whole, whatever the family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from combinations import LABELS, Combination
from families import ENCODER_DECODERS, ENCODERS, save_family
from test_conformance import Stop, federation_of, held_out_loss, stop_after_the_first
from tiny import TinyFederation, mostly_thorough

from fedllm.models.load import load_base
from fedllm.models.settings import ModelSettings
from fedllm.runtime.run import Watch, resume
from fedllm.tasks import CLASSIFICATION, Task

Make = Callable[..., TinyFederation]
TRIED = mostly_thorough([*ENCODERS, *ENCODER_DECODERS, "gpt2", "llama"], "bert", "distilbert")
WHOLE = ("classifier", "score", "classification_head", "pooler")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", TRIED)
def test_a_quantised_classifier_is_tuned_to_the_same_bits_again_and_delivered(
    family: str, bits: int, make_federation: Make, tmp_path: Path
) -> None:
    one = Combination("LoRA", family, CLASSIFICATION)
    folder = save_family(family, CLASSIFICATION, tmp_path / family)

    def make(**options: object) -> TinyFederation:
        job = options.pop("job")
        assert isinstance(job, dict)
        return make_federation(job=job | {f"model.load_in_{bits}bit": True}, **options)

    federation = federation_of(one, folder, make)
    whole = federation.run("whole")
    with pytest.raises(Stop):
        federation.run("broken", watch=Watch(on_round=stop_after_the_first))
    assert resume(federation.folder / "broken").adapter_sha256 == whole.adapter_sha256
    values = {(row["round"], row["split"], row["name"]): row["value"] for row in whole.rows() if row["party"] is None}
    assert values[1, None, "update_norm"] > 0
    assert held_out_loss(one, federation, whole) == pytest.approx(values[2, "held_out", "loss_nats"], rel=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2", "albert", "bart", "llama"])
def test_of_a_quantised_classifier_the_head_is_that_of_the_whole_one_and_all_else_is_quantised(
    family: str, bits: int, tmp_path: Path
) -> None:
    folder, task = save_family(family, CLASSIFICATION, tmp_path / family), Task(CLASSIFICATION, LABELS)
    settings = ModelSettings(model_name_or_path=str(folder))
    quantised = settings.model_copy(update={f"load_in_{bits}bit": True})
    plain, held = (load_base(one, folder=folder, task=task).model for one in (settings, quantised))
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear):
            is_whole = any(word in name for word in WHOLE)
            weight = held.get_submodule(name).weight
            assert weight.is_floating_point() == is_whole, name
            assert not is_whole or torch.equal(weight, module.weight)
