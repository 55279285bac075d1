"""Clipped updates, noise on their sum, and the clip norm that follows the updates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.privacy.noise import NoiseStream
from fedllm.privacy.party_level import clipped, next_norm, noise_left, noise_to_signal, norm_of, with_noise


def update_of(seed: int, scale: float) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) * scale for name, shape in (("a", (7, 3)), ("b", (50,)))}


def total(updates: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: sum(update[name].double() for update in updates) for name in updates[0]}  # type: ignore[misc]


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-6, 1e6), clip=st.floats(1e-3, 1e3))
@settings(max_examples=60)
def test_whatever_one_party_sends_the_sum_moves_by_the_clip_norm_at_most(seed: int, scale: float, clip: float) -> None:
    others = [clipped(update_of(number, 1.0), clip) for number in range(3)]
    one = clipped(update_of(seed, scale), clip)
    without = total([*others, {name: torch.zeros_like(tensor) for name, tensor in one.items()}])
    moved = {name: tensor - without[name] for name, tensor in total([*others, one]).items()}
    assert norm_of(moved) <= clip * (1 + 1e-12)
    # Without the clip it moves by as much as the party likes.
    assert norm_of(update_of(seed, scale)) > clip or torch.allclose(one["a"], update_of(seed, scale)["a"], rtol=1e-5)


def test_the_noise_has_the_deviation_that_it_is_counted_as() -> None:
    means = {"a": torch.zeros(1000, 700), "b": torch.zeros(300_000)}
    noisy = with_noise(means, 0.37, NoiseStream(bytes(32), "run", 1))
    values = torch.cat([tensor.double().flatten() for tensor in noisy.values()])
    assert float(values.std()) == pytest.approx(0.37, rel=0.01)
    assert float((noisy["a"].flatten()[:1000] * noisy["b"][:1000]).mean()) == pytest.approx(0, abs=0.02)
    again = with_noise(means, 0.37, NoiseStream(bytes(32), "run", 1))
    other = with_noise(means, 0.37, NoiseStream(bytes(32), "run", 2))
    assert torch.equal(noisy["a"], again["a"]) and not torch.equal(noisy["a"], other["a"])


def test_the_clip_norm_goes_to_the_median_of_the_norms() -> None:
    norms, clip = [0.5 + 0.01 * number for number in range(101)], 0.1
    for _ in range(80):
        clip = next_norm(clip, sum(norm <= clip for norm in norms), len(norms))
    assert clip == pytest.approx(1.0, rel=0.05)


def test_the_noise_on_the_bits_takes_its_share() -> None:
    # Andrew et al., theorem 1: both together are worth z.
    left = noise_left(1.0, 100)
    assert left**-2 + (2 * 5.0) ** -2 == pytest.approx(1.0)
    with pytest.raises(ValueError, match="so few parties"):
        noise_left(1.0, 5)


def test_the_figure_of_the_warning() -> None:
    # Ten parties, noise 3, four million values: six hundred times the clip norm on the sum of ten.
    assert noise_to_signal(3.0, parties=10, size=4_000_000) == pytest.approx(600)
    assert math.isclose(noise_to_signal(1.0, parties=1000, size=10_000), 0.1)
