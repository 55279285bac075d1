"""LoRA's factors drawn anew for a round, at the server and at every party alike."""

from __future__ import annotations

import math
import re

import torch

from fedllm.seeds import stream
from fedllm.wire.payload import Manifest, Tensors

_UNIFORM = re.compile(r"\.lora_A\.")
_NORMAL = re.compile(r"\.lora_embedding_B\.")
_ZERO = re.compile(r"\.lora_(B|embedding_A)\.")


def fresh_factors(manifest: Manifest, seed: int, number: int) -> Tensors:
    """Return LoRA's factors as they are drawn after a round: as at the start, which is round 0, but each round others.

    What is no LoRA factor is left out.

    Args:
        manifest: The adapter's.
        seed: The job's seed.
        number: The round.
    """
    found = {name: spec.zeros() for name, spec in manifest.items() if _ZERO.search(name)}
    for name, spec in manifest.items():
        draw, shape = stream(seed, "initial", name, *([number] if number else [])), tuple(spec.shape)
        if _UNIFORM.search(name):
            bound = math.prod(shape[1:]) ** -0.5
            found[name] = torch.from_numpy(draw.uniform(-bound, bound, shape)).to(spec.zeros().dtype)
        elif _NORMAL.search(name):
            found[name] = torch.from_numpy(draw.standard_normal(shape)).to(spec.zeros().dtype)
    return found
