"""AdaLoRA in a federation: ranks shrink by rounds, alike at all parties, by what the global adapter holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedllm.models.settings import PeftSettings

_VALUES = ".lora_E."


def penalty(trainable: Mapping[str, torch.Tensor], weight: float) -> torch.Tensor:
    """Return the penalty on factors that are not orthogonal, a scalar.

    Source: Zhang et al. 2023, arXiv:2303.10512, equation 4: |P^T P - I|^2 + |Q Q^T - I|^2; as in PEFT the mean of the
    norms over all factors, not the sum of the squares.

    Args:
        trainable: The adapter's tensors.
        weight: `orth_reg_weight`.
    """
    norms = []
    for name, tensor in trainable.items():
        if ".lora_A." in name or ".lora_B." in name:
            product = tensor @ tensor.T if ".lora_A." in name else tensor.T @ tensor
            norms.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
    return weight * torch.stack(norms).mean()


def budget(number: int, num_rounds: int, peft: PeftSettings) -> float:
    """Return the mean rank of a site in a round.

    Source: as `penalty`, equation 12, with rounds for steps: init_r in the first round and for `tinit` rounds more,
    then down to target_r along a cube, which is reached `tfinal` rounds before the last.

    Args:
        number: The round, from 1 on.
        num_rounds: Rounds of the run.
        peft: The tuning method.
    """
    first, last = float(peft.init_r or 0), float(peft.target_r or 0)
    begin, end = 1 + (peft.tinit or 0), num_rounds - (peft.tfinal or 0)
    left = 1.0 if number <= begin else max(0.0, (end - number) / max(1, end - begin))
    return last + (first - last) * left**3


def kept_values(state: Mapping[str, torch.Tensor], mean_rank: float) -> dict[str, torch.Tensor]:
    """Return which singular values stay, as masks of 0 and 1 by the names of the values.

    The largest stay, over all sites together. Source: as `penalty`, section 3.2, with |lambda| as the importance: it
    follows from the global adapter alone, so that all parties cut alike and nothing more is sent. Differs: the paper's
    sensitivities are of one machine's gradients, and its values may come back; here a value once cut stays cut.

    Args:
        state: The global adapter.
        mean_rank: From `budget`.
    """
    values = {name: tensor.detach().to("cpu") for name, tensor in state.items() if _VALUES in name}
    flat = torch.cat([tensor.flatten() for tensor in values.values()]).abs()
    count = min(len(flat), round(mean_rank * len(values)))
    kept = torch.zeros_like(flat)
    # A stable order: where some are equal, sites and places decide.
    kept[flat.argsort(descending=True, stable=True)[:count]] = 1
    parts = torch.split(kept, [tensor.numel() for tensor in values.values()])
    return {name: part.reshape(values[name].shape) for name, part in zip(values, parts, strict=True)}
