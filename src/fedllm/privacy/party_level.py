"""Differential privacy of whole parties: clipped updates, and noise on their sum.

Source: McMahan et al. 2018, arXiv:1710.06963 (clipped updates, noise on the mean); Andrew et al. 2021,
arXiv:1905.03871, algorithm 1 (adaptive clipping). Differs: all parties that are drawn count in every round, for who is
drawn is no secret, so nothing is won by sampling; the mean is over those whose updates arrived, which is no secret
either. Neighbours differ in one party's updates, which are replaced by zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fedllm.privacy.noise import NoiseStream
from fedllm.wire.payload import Tensors

# Andrew et al., section 3: the clip norm goes to the median of the norms, by a fifth of the way in a round.
QUANTILE, RATE, FIRST_NORM = 0.5, 0.2, 0.1
# Standard deviation of the noise on the number of parties within the clip norm, as a share of the parties.
BIT_SHARE = 1 / 20


def norm_of(update: Mapping[str, torch.Tensor]) -> float:
    """Return the L2 norm over all tensors.

    Args:
        update: Named tensors.
    """
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in update.values()))


def clipped(update: Mapping[str, torch.Tensor], clip_norm: float) -> Tensors:
    """Return an update whose L2 norm is at most the clip norm.

    Args:
        update: A party's.
        clip_norm: The largest norm.
    """
    # A little less, so that rounding to float32 does not pass it.
    share = min(1.0, clip_norm * (1 - 1e-6) / max(norm_of(update), 1e-30))
    return {name: tensor * share for name, tensor in update.items()}


def noise_left(noise_multiplier: float, parties: int) -> float:
    """Return the noise multiplier of the updates when the noise on the bits takes its share.

    Source: Andrew et al., theorem 1: z_update = (z^-2 - (2 sigma_b)^-2)^(-1/2).

    Args:
        noise_multiplier: z, of both together.
        parties: How many parties, of which the noise on the bits is a share.

    Raises:
        ValueError: The noise on the bits alone is not enough.
    """
    left = noise_multiplier**-2 - (2 * BIT_SHARE * parties) ** -2
    if left <= 0:
        raise ValueError("with so few parties the noise on the bits is too small for this noise multiplier")
    return float(left**-0.5)


def next_norm(clip_norm: float, within: float, parties: int) -> float:
    """Return the clip norm of the next round: C exp(-0.2 (share of the parties within C - 1/2)).

    Args:
        clip_norm: C.
        within: How many parties' updates were within it, with noise.
        parties: How many parties there were.
    """
    share = min(max(within / parties, 0.0), 1.0)
    return clip_norm * math.exp(-RATE * (share - QUANTILE))


def with_noise(means: Mapping[str, torch.Tensor], deviation: float, noise: NoiseStream) -> Tensors:
    """Return a mean with Gaussian noise on each value.

    Args:
        means: Named tensors.
        deviation: Standard deviation of the noise.
        noise: Secret numbers.
    """
    return {
        name: means[name]
        + torch.from_numpy(noise.normals(means[name].numel(), "update", name) * deviation)
        .reshape(means[name].shape)
        .to(means[name].dtype)
        for name in sorted(means)
    }


def noise_to_signal(noise_multiplier: float, *, parties: int, size: int) -> float:
    """Return the norm of the noise on the mean, over that of the largest mean of clipped updates.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum, in clip norms.
        parties: How many are summed.
        size: How many values an update has.
    """
    return noise_multiplier * math.sqrt(size) / parties
