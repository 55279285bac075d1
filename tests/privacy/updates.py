"""What a server receives of a party that trains on known texts: real updates, over the wire."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedllm.data.settings import DataSettings
from fedllm.data.tokens import TokenisedExample
from fedllm.models.adapter import TunableModel
from fedllm.models.load import load_base
from fedllm.models.settings import ModelSettings, PeftSettings
from fedllm.privacy.settings import PrivacySettings
from fedllm.scenarios import SCENARIOS
from fedllm.scenarios.base import ClientContext, Summand, TokenData
from fedllm.scenarios.fedhomollm_client import Client
from fedllm.scenarios.fedhomollm_messages import Train
from fedllm.train.base import LocalTrainer
from fedllm.train.settings import TrainSettings
from fedllm.train.supervised import SupervisedTrainer
from fedllm.wire.frame import decode, encode, pack, unpack
from fedllm.wire.payload import Envelope, Payload, Tensors

SGD = {"optim": "sgd", "learning_rate": 0.1, "local_steps": 1, "lr_scheduler_type": "constant"}


def examples_of(texts: Sequence[Sequence[int]]) -> list[TokenisedExample]:
    """Return texts, each a sequence of tokens, as examples whose every token but the first is a target."""
    return [TokenisedExample(tuple(ids), (False, *[True] * (len(ids) - 1)), False, len(ids)) for ids in texts]


def random_texts(draws: np.random.Generator, *, distinct: int, length: int = 12, count: int = 2) -> list[list[int]]:
    """Return texts that together hold exactly so many distinct tokens out of 3..299."""
    words = draws.choice(np.arange(3, 300), size=distinct, replace=False)
    repeated = draws.integers(0, distinct, count * length - distinct)
    places = draws.permutation(np.concatenate([np.arange(distinct), repeated]))
    return [[int(words[i]) for i in places[k * length : (k + 1) * length]] for k in range(count)]


def tunable(base: Path, **peft: Any) -> TunableModel:
    """Return the tiny Llama with an adapter on all of its attention, or what `peft` says."""
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    full = peft.get("peft_type") == "FULL"
    model = load_base(ModelSettings(model_name_or_path=str(base)), folder=base).model
    return TunableModel(model, PeftSettings(**(peft if full else settings | peft)))


def warm_start(model: TunableModel, draws: np.random.Generator) -> Tensors:
    """Return an adapter as of a later round: factor B is no longer zero."""
    start = model.initial(3)
    return {
        name: torch.from_numpy(0.05 * draws.standard_normal(tuple(value.shape))).float() if "lora_B" in name else value
        for name, value in start.items()
    }


def over_the_wire(payload: Payload, *, sender: str = "server", recipient: str = "north") -> Payload:
    """Return what the receiver of a message reads."""
    envelope = Envelope(job_digest="0" * 64, run_id="1" * 32, round=1, sequence=1, sender=sender, recipient=recipient)
    frame = unpack(pack(encode(payload, envelope)), max_bytes=2**30)
    return decode(frame, SCENARIOS["FedHomoLLM"].kinds())


def update_of(
    model: TunableModel,
    start: Tensors,
    texts: Sequence[Sequence[int]],
    *,
    train: dict[str, Any] | None = None,
    trainer: LocalTrainer | None = None,
) -> Tensors:
    """Return the update that a party's client sends after training on the texts, as the server reads it."""
    return update_after(model, start, examples_of(texts), train=train, trainer=trainer)


def update_after(
    model: TunableModel,
    start: Tensors,
    examples: Sequence[TokenisedExample],
    *,
    train: dict[str, Any] | None = None,
    trainer: LocalTrainer | None = None,
) -> Tensors:
    """Return the update that a party's client sends after training on the examples, as the server reads it."""
    values = {"per_device_train_batch_size": len(examples), "max_grad_norm": 0} | SGD | (train or {})
    line = SCENARIOS["FedHomoLLM"]
    client = Client(
        ClientContext(
            party="north",
            parties=("north", "east", "south"),
            seed=5,
            settings=line.settings.model_validate({"num_rounds": 4}),
            model=model,
            pad_id=0,
            data=TokenData(examples, examples, []),
            data_settings=DataSettings(max_length=64),
            train_settings=TrainSettings.model_validate(values),
            privacy=PrivacySettings(),
            eval_batch_size=4,
            trainer=trainer or SupervisedTrainer(),
            log=lambda round_, split, values: None,
        )
    )
    request = over_the_wire(Train(adapter=start))
    reply = over_the_wire(client.handle(request, round_=1, deadline=math.inf), sender="north", recipient="server")
    assert isinstance(reply, Summand)
    head = "update/"
    return {name.removeprefix(head): value.clone() for name, value in reply.tensors.items() if name.startswith(head)}
