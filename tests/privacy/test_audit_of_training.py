"""An audit of training with noise: what is claimed is not refuted, and with the noise off or too small it is.

The trainer is a plain DP-SGD over all examples in every step, inside the real client; the claim is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_dp import ReferenceDP
from tiny import make_tokenizer
from updates import tunable, update_after

from fedllm.data.batches import collate
from fedllm.data.settings import DataSettings
from fedllm.data.tokens import TokenisedExample
from fedllm.evaluate.loss import example_losses
from fedllm.models.adapter import TunableModel
from fedllm.models.loss import target_logits
from fedllm.privacy.auditing import LowerBound, one_run_audit
from fedllm.privacy.canaries import CanaryMaker, CanarySet
from fedllm.privacy.membership import exposure

EPSILON, DELTA = 1.0, 1e-5
CLIP_NORM = 1.0


def gaussian_delta(epsilon: float, *, noise_multiplier: float, steps: int) -> float:
    """Return the delta of so many Gaussian sums, exactly.

    Source: Balle and Wang 2018, arXiv:1805.06530, theorem 8, for a sensitivity of sqrt(steps) clip norms.
    """
    mu = math.sqrt(steps) / noise_multiplier

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)


def noise_for(epsilon: float, delta: float, steps: int) -> float:
    low, high = 0.1, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        enough = gaussian_delta(epsilon, noise_multiplier=middle, steps=steps) <= delta
        low, high = (low, middle) if enough else (middle, high)
    return high


def test_the_claim_of_the_tests_is_that_of_the_accountants() -> None:
    # 10 sums with sigma 1: 17.86 by Google's dp-accounting (PLD).
    assert gaussian_delta(17.86, noise_multiplier=1, steps=10) == pytest.approx(1e-5, rel=0.05)


@dataclass(frozen=True)
class Rig:
    model: TunableModel
    maker: CanaryMaker

    def trained(self, examples: Sequence[TokenisedExample], *, batch: int, noise: float, steps: int) -> None:
        """Leave the model as a party's update makes it."""
        start = self.model.initial(3)
        train = {"optim": "adamw_torch", "learning_rate": 0.03, "local_steps": steps}
        trainer = ReferenceDP(clip_norm=CLIP_NORM, noise_multiplier=noise)
        train |= {"per_device_train_batch_size": batch}
        update = update_after(self.model, start, examples, train=train, trainer=trainer)
        self.model.write({name: start[name] + update[name] for name in start})

    def change(self, examples: Sequence[TokenisedExample]) -> np.ndarray:
        """Return by how much training changed each example's loss."""
        after = example_losses(self.model.model, examples, pad_id=0, batch_size=64)
        with self.model.untuned() as model:
            found: np.ndarray = after - example_losses(model, examples, pad_id=0, batch_size=64)
        return found

    def audit(self, canaries: CanarySet, *, noise: float, steps: int) -> LowerBound:
        self.trained(canaries.planted(1), batch=len(canaries.canaries), noise=noise, steps=steps)
        return one_run_audit(-self.change(canaries.canaries), canaries.included, delta=DELTA)


@pytest.fixture(scope="module")
def rig(base: Path) -> Rig:
    torch.set_num_threads(1)
    model = tunable(base, target_modules="all-linear")
    return Rig(model, CanaryMaker(make_tokenizer(), DataSettings(max_length=20), seed=1))


def test_the_claim_holds_with_noise_and_is_refuted_without(rig: Rig) -> None:
    """The second half is the power control: an audit that finds nothing without noise proves nothing with it."""
    canaries = rig.maker.make("north", "prompt_completion", number=120, decoys=0)
    steps = 10
    noise = noise_for(EPSILON, DELTA, steps)
    assert rig.audit(canaries, noise=noise, steps=steps).epsilon <= EPSILON
    assert rig.audit(canaries, noise=0.0, steps=steps).epsilon > EPSILON
    # Noise on the mean as on the sum is too little by a factor of the batch: a mistake that was made before.
    assert rig.audit(canaries, noise=noise / len(canaries.canaries), steps=steps).epsilon > EPSILON


def extracted(model: torch.nn.Module, secret: TokenisedExample) -> bool:
    """Return whether greedy decoding after the secret's prompt says the rest of it, word for word."""
    logits, targets, _ = target_logits(model, collate([secret], pad_id=0))
    return bool((logits.argmax(dim=-1) == targets).all())


def test_planted_secrets_are_extracted_and_noise_hides_them(rig: Rig) -> None:
    """50 secrets, planted once, 4 and 16 times. Noise for one example is less of a promise for 16 copies of it."""
    made = rig.maker.make("south", "prompt_completion", number=50, decoys=500)
    copies = np.array([1] * 17 + [4] * 17 + [16] * 16)
    examples = [each for each, times in zip(made.canaries, copies, strict=True) for _ in range(times)]
    found, steps = [], 25
    for noise in (0.0, noise_for(EPSILON, DELTA, steps)):
        rig.trained(examples, batch=len(examples), noise=noise, steps=steps)
        bits = exposure(rig.change(made.canaries), rig.change(made.decoys))
        said = sum(extracted(rig.model.model, each) for each in made.canaries)
        found.append(([float(bits[copies == times].mean()) for times in (1, 4, 16)], said))
    (plain, said_plain), (noisy, said_noisy) = found
    # Of 9.0 bits at most; a rank at random has 1.4 bits on average, with an error of 0.35 over 17 secrets.
    assert plain[0] > 4 and plain[1] > 8 and plain[2] > 8.9 and said_plain > 10
    assert max(noisy[:2]) < 2.5 and noisy[2] < 5 and said_noisy <= 1
