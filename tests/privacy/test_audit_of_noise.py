"""The noise of private training under the strongest audit: each canary has a direction of its own to be looked for in.

Such canaries (Dirac gradients, see Nasr et al. 2023, arXiv:2302.07956) see noise that is too small by a factor of
three, where an audit by losses sees only noise that is missing. Everything but the model is what a run uses.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedllm.data.batches import BatchOrder
from fedllm.data.settings import DataSettings
from fedllm.data.tokens import TokenisedExample
from fedllm.privacy.accountant import noise_for
from fedllm.privacy.auditing import one_run_audit
from fedllm.privacy.noise import NoiseStream
from fedllm.privacy.rounds import PrivateRound
from fedllm.seeds import stream
from fedllm.train.base import TrainTask
from fedllm.train.private import PrivateTrainer
from fedllm.train.settings import TrainSettings

EPSILON, DELTA = 2.0, 1e-5
CANARIES, STEPS = 1000, 8
# So small that no gradient changes in the course of training.
RATE = 1e-9


class Directions(nn.Module):
    """A language model of one parameter a word, which only texts that begin with the word can move."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(words))
        self._first = torch.eye(words)[0]

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.weight[:, None])

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        said = self.weight[input_ids[:, :1]].expand(input_ids.shape)
        return SimpleNamespace(logits=100 * said[..., None] * self._first)


def audited(*, sampling_rate: float, noise_multiplier: float) -> float:
    """Return the lower bound of epsilon of private training with such noise."""
    torch.set_num_threads(1)
    model = Directions(CANARIES + 1)
    included = stream(0, "test", "directions").random(CANARIES) < 0.5
    examples = [TokenisedExample((i + 1, 0), (False, True), False, 1) for i in np.flatnonzero(included)]
    units = [(index,) for index in range(len(examples))]
    noise = NoiseStream(bytes(range(32)), "test")
    task = TrainTask(
        party="north",
        round=1,
        seed=1,
        model=SimpleNamespace(model=model, trainable={"weight": model.weight}, penalty=lambda: None),  # type: ignore
        examples=examples,
        order=BatchOrder(len(examples), 500, seed=1, party="north"),
        pad_id=0,
        settings=TrainSettings(learning_rate=RATE, local_steps=STEPS, per_device_train_batch_size=500, optim="sgd"),
        data_settings=DataSettings(),
        first_step=0,
        num_steps=STEPS,
        learning_rate=lambda step: RATE,
        deadline=math.inf,
        private=PrivateRound(units, sampling_rate, noise_multiplier, 1.0, noise),
    )
    PrivateTrainer().train(task, torch.optim.SGD([model.weight], lr=RATE))
    return one_run_audit(model.weight.detach().numpy()[1:], included, delta=DELTA).epsilon


@pytest.mark.parametrize("sampling_rate", [1.0, 0.5])
def test_the_noise_keeps_its_claim_and_a_third_of_it_does_not(sampling_rate: float) -> None:
    enough = noise_for(EPSILON, delta=DELTA, sampling_rate=sampling_rate, steps=STEPS, accountant="PLD")
    # Not only no more than the claim: the audit does see something.
    assert 0.2 < audited(sampling_rate=sampling_rate, noise_multiplier=enough) <= EPSILON
    assert audited(sampling_rate=sampling_rate, noise_multiplier=enough / 3) > EPSILON
