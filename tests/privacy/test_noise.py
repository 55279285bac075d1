"""Noise: that it is normal, secret, and the same again for the same labels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fedllm.errors import StateLost
from fedllm.privacy.noise import KEY_BYTES, NoiseStream, key_name, noise_key
from fedllm.privacy.rounds import PrivateRound

KEY = bytes(range(32))
MILLION = 1_000_000


def test_a_million_numbers_have_the_spread_that_was_asked_for() -> None:
    limits = PrivateRound([(0,)], 1.0, 2.5, 0.4, NoiseStream(KEY, "spread"))
    drawn = limits.normals(MILLION, 0)
    assert abs(drawn.std() / (2.5 * 0.4) - 1) < 0.01
    assert abs(drawn.mean()) < 5 / math.sqrt(MILLION)


def test_they_are_normal() -> None:
    drawn = np.sort(NoiseStream(KEY, "shape").normals(MILLION))
    # Kolmogorov and Smirnov: 1.95 is passed once in a thousand times.
    known = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in drawn[::100]])
    assert np.abs(known - np.arange(0, MILLION, 100) / MILLION).max() * math.sqrt(MILLION) < 1.95
    for bound, share in ((1, 0.3173), (2, 0.0455), (3, 0.0027)):
        assert (np.abs(drawn) > bound).mean() == pytest.approx(share, rel=0.05)


def test_numbers_of_two_labels_have_nothing_in_common() -> None:
    stream = NoiseStream(KEY, "run", 1)
    first = stream.normals(100_000, "a")
    for other in (stream.normals(100_000, "b"), NoiseStream(KEY, "run", 2).normals(100_000, "a")):
        assert abs(float(np.corrcoef(first, other)[0, 1])) < 0.02
    # Nor the two halves of one draw, which come of the same pairs.
    assert abs(float(np.corrcoef(first[:50_000], first[50_000:])[0, 1])) < 0.02


def test_the_same_labels_give_the_same_bits() -> None:
    first = NoiseStream(KEY, "run", 1).normals(7, "a", 3)
    assert (NoiseStream(KEY, "run", 1).normals(7, "a", 3) == first).all()
    assert (NoiseStream(bytes(32), "run", 1).normals(7, "a", 3) != first).all()
    # Labels of the stream and of the draw are not run together.
    assert (NoiseStream(KEY, "run", 1, "a").normals(7, 3) != first).all()


def test_uniform_numbers_are_below_one_and_fill_the_range() -> None:
    drawn = NoiseStream(KEY).uniforms(MILLION)
    assert 0 <= drawn.min() < 1e-5 and 1 - 1e-5 < drawn.max() < 1
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    assert ((counts - 1e4) ** 2 / 1e4).sum() < 160


def test_a_key_is_drawn_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "party" / "noise.key"
    key = noise_key(path)
    assert len(key) == KEY_BYTES and noise_key(path) == key
    assert path.stat().st_mode & 0o777 == 0o600
    assert noise_key(tmp_path / "other.key") != key
    assert key.hex() not in key_name(key) and len(key_name(key)) == 16


def test_a_damaged_key_is_not_replaced_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "noise.key"
    path.write_bytes(b"short")
    with pytest.raises(StateLost, match="STATE_CORRUPT"):
        noise_key(path)
    assert path.read_bytes() == b"short"
