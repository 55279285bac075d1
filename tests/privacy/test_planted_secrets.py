"""Secrets planted in training: extracted word for word, and hidden by noise.

The trainer is a plain DP-SGD over all examples in every step, inside the real client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_dp import ReferenceDP
from tiny import make_tokenizer, thorough
from updates import tunable, update_after

from fedllm.data.batches import collate
from fedllm.data.settings import DataSettings
from fedllm.data.tokens import TokenisedExample
from fedllm.evaluate.loss import example_losses
from fedllm.models.adapter import TunableModel
from fedllm.models.loss import target_logits
from fedllm.privacy.accountant import noise_for
from fedllm.privacy.canaries import CanaryMaker
from fedllm.privacy.membership import exposure


@dataclass(frozen=True)
class Rig:
    model: TunableModel
    maker: CanaryMaker

    def trained(self, examples: Sequence[TokenisedExample], *, batch: int, noise: float, steps: int) -> None:
        """Leave the model as a party's update makes it."""
        start = self.model.initial(3)
        train = {"optim": "adamw_torch", "learning_rate": 0.03, "local_steps": steps}
        trainer = ReferenceDP(clip_norm=1.0, noise_multiplier=noise)
        train |= {"per_device_train_batch_size": batch}
        update = update_after(self.model, start, examples, train=train, trainer=trainer)
        self.model.write({name: start[name] + update[name] for name in start})

    def change(self, examples: Sequence[TokenisedExample]) -> np.ndarray:
        """Return by how much training changed each example's loss."""
        after = example_losses(self.model.model, examples, pad_id=0, batch_size=64)
        with self.model.untuned() as model:
            found: np.ndarray = after - example_losses(model, examples, pad_id=0, batch_size=64)
        return found


@pytest.fixture(scope="module")
def rig(base: Path) -> Rig:
    torch.set_num_threads(1)
    model = tunable(base, target_modules="all-linear")
    return Rig(model, CanaryMaker(make_tokenizer(), DataSettings(max_length=20), seed=1))


def extracted(model: torch.nn.Module, secret: TokenisedExample) -> bool:
    """Return whether greedy decoding after the secret's prompt says the rest of it, word for word."""
    logits, targets, _ = target_logits(model, collate([secret], pad_id=0))
    return bool((logits.argmax(dim=-1) == targets).all())


@thorough
def test_planted_secrets_are_extracted_and_noise_hides_them(rig: Rig) -> None:
    """50 secrets, planted once, 4 and 16 times. Noise for one example is less of a promise for 16 copies of it."""
    made = rig.maker.make("south", "prompt_completion", number=50, decoys=500)
    copies = np.array([1] * 17 + [4] * 17 + [16] * 16)
    examples = [each for each, times in zip(made.canaries, copies, strict=True) for _ in range(times)]
    found, steps = [], 25
    enough = noise_for(1.0, delta=1e-5, sampling_rate=1.0, steps=steps, accountant="RDP")
    for noise in (0.0, enough):
        rig.trained(examples, batch=len(examples), noise=noise, steps=steps)
        bits = exposure(rig.change(made.canaries), rig.change(made.decoys))
        said = np.array([extracted(rig.model.model, each) for each in made.canaries])
        found.append([(float(bits[copies == n].mean()), int(said[copies == n].sum())) for n in (1, 4, 16)])
    plain, noisy = found
    # Of 9.0 bits at most; a rank at random has 1.4 bits on average, with an error of 0.35 over 17 secrets.
    assert plain[0][0] > 4 and plain[1][0] > 8 and plain[2][0] > 8.9
    assert plain[0][1] == 0 and plain[2][1] == 16
    assert noisy[0][0] < 2.5 and noisy[1][0] < 2.5 and noisy[2][0] < 5
    assert sum(said for _, said in noisy) <= 1
