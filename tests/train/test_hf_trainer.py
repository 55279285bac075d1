"""A Trainer of transformers, or a subclass of it, as the local trainer."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import thorough, write_jsonl

from fedllm.errors import ConfigError
from fedllm.train.hf_trainer import HFTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


def adapter(result: Any) -> dict[str, torch.Tensor]:
    return load_file(result.adapter / "adapter_model.safetensors")


SGD = {"train.optim": "sgd", "train.learning_rate": 0.05}
CHANGES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "accumulated": {"train.gradient_accumulation_steps": 2, "train.optimizer_state": "reset"},
    "pulled": SGD | {"federation.strategy": {"name": "FedProx", "proximal_mu": 1.0}},
    "control variates": SGD | {"federation.strategy": {"name": "SCAFFOLD"}},
    "AdaLoRA": SGD | {"peft": {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "target_modules": ["q_proj"]}},
    "prompts": SGD | {"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}},
    "bottlenecks": SGD | {"peft": {"peft_type": "BOTTLENECK", "bottleneck_size": 4}},
    "labels": SGD | {"data.task": "sequence_classification", "data.labels": ["red", "blue"], "peft": {"r": 2}},
}


OTHERS = ("pulled", "AdaLoRA", "prompts", "bottlenecks")


@pytest.mark.parametrize("case", [pytest.param(name, marks=thorough if name in OTHERS else ()) for name in CHANGES])
def test_transformers_trainer_gives_the_same_adapter_as_ours(make_federation: Any, case: str) -> None:
    from transformers import Trainer

    changes = CHANGES[case]
    federation = make_federation(job=changes)
    for path in (federation.folder / "data").glob("*.jsonl") if "data.labels" in changes else ():
        rows = [{"text": json.loads(line)["prompt"], "label": i % 2} for i, line in enumerate(path.open())]
        write_jsonl(path, rows)
    ours = adapter(federation.run("ours"))
    theirs = adapter(federation.run("theirs", trainer=HFTrainer(Trainer)))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_subclass_decides_the_loss(make_federation: Any) -> None:
    from transformers import Trainer

    class Halved(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * 0.5

    # SGD without clipping: half the loss is half the step.
    changes = {"train.optim": "sgd", "train.max_grad_norm": 0, "train.local_steps": 1, "federation.num_rounds": 1}
    changes |= {"train.lr_scheduler_type": "constant", "federation.keep": "last"}
    federation = make_federation(job=changes)
    whole = adapter(federation.run("whole", trainer=HFTrainer(Trainer)))
    half = adapter(federation.run("half", trainer=HFTrainer(Halved)))
    moved = [name for name in whole if "lora_B" in name]
    assert moved
    for name in moved:
        assert whole[name].abs().max() > 0
        torch.testing.assert_close(half[name], whole[name] / 2, atol=2e-8, rtol=1e-3)


def test_the_global_generators_are_left_as_they_were(make_federation: Any) -> None:
    from transformers import Trainer

    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    make_federation().run(trainer=HFTrainer(Trainer))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    assert before[2] == random.getstate()


def test_what_the_job_sets_cannot_be_set_twice() -> None:
    with pytest.raises(ConfigError) as caught:
        HFTrainer(object, arguments={"learning_rate": 1.0})
    assert caught.value.code == "BAD_COMBINATION"


def test_a_trainer_cannot_travel_to_workers(make_federation: Any) -> None:
    from transformers import Trainer

    with pytest.raises(ConfigError) as caught:
        make_federation().run(trainer=HFTrainer(Trainer), num_workers=1)
    assert caught.value.code == "BAD_COMBINATION"
