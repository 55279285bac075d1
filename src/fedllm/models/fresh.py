"""First values of what is tuned, drawn from the job's seed alone; of LoRA's factors also anew in each round."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import torch

from fedllm.models.settings import PeftType
from fedllm.seeds import stream
from fedllm.wire.payload import Manifest, Tensors, TensorSpec

# (generator, shape) -> first values.
_Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _uniform(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    bound = math.prod(shape[1:]) ** -0.5
    return draw.uniform(-bound, bound, shape)


def _normal(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return draw.standard_normal(shape)


def _small(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return 0.02 * draw.standard_normal(shape)


def _zero(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape)


_PROMPT: dict[str, _Draw] = {
    r"^prompt_encoder\..*embedding\.weight$": _normal,
    r"^prompt_encoder\..*\.weight$": _uniform,
    r"^prompt_encoder\.": _zero,
}
# Method -> pattern of a parameter's name -> its first values, distributed as PEFT draws them; but of the network behind
# virtual tokens the biases begin at 0. The first pattern that fits counts. What fits none is computed from the base
# model, or is the base model's own.
_DRAWS: dict[PeftType, dict[str, _Draw]] = {
    "LORA": {r"\.lora_A\.": _uniform, r"\.lora_embedding_B\.": _normal, r"\.lora_(B|embedding_A)\.": _zero},
    "ADALORA": {r"\.lora_(A|B)\.": _small, r"\.lora_E\.": _zero},
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "BOTTLENECK": {r"\.bottleneck\.down\.weight$": _uniform, r"\.bottleneck\.": _zero},
}


def is_drawn(name: str, method: PeftType) -> bool:
    """Return whether a parameter's first values are drawn; they follow from the base model otherwise.

    Args:
        name: The parameter.
        method: The tuning method.
    """
    return _draw_of(name, method) is not None


def first_value(name: str, spec: TensorSpec, method: PeftType, *, seed: int, number: int = 0) -> torch.Tensor:
    """Return the first values of a parameter that is drawn, from a counter-based generator: alike on all machines.

    Args:
        name: The parameter.
        spec: Its shape and dtype.
        method: The tuning method.
        seed: The job's seed.
        number: The round after which it is drawn; 0 is the start.
    """
    draw = _draw_of(name, method)
    if draw is None:
        raise ValueError(f"{name} is not drawn")
    values = draw(stream(seed, "initial", name, *([number] if number else [])), tuple(spec.shape))
    return torch.from_numpy(values).to(spec.zeros().dtype)


def fresh_factors(manifest: Manifest, seed: int, number: int) -> Tensors:
    """Return LoRA's factors as they are drawn after a round: as at the start, which is round 0, but each round others.

    What is no LoRA factor is left out.

    Args:
        manifest: The adapter's.
        seed: The job's seed.
        number: The round.
    """
    drawn = {name: spec for name, spec in manifest.items() if is_drawn(name, "LORA")}
    return {name: first_value(name, spec, "LORA", seed=seed, number=number) for name, spec in drawn.items()}


def _draw_of(name: str, method: PeftType) -> _Draw | None:
    fitting = (draw for pattern, draw in _DRAWS.get(method, {}).items() if re.search(pattern, name))
    return next(fitting, None)
