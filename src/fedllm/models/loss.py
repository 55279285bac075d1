"""The loss of each target token of a batch: what training and evaluation both sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

IGNORED = -100


def target_losses(model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (negative log-likelihoods in nats, row numbers), one of each per target token, in float32.

    Args:
        model: A causal language model whose output has `logits`.
        batch: `input_ids`, `attention_mask`, `labels` (`IGNORED` = not a target), perhaps `position_ids`; each of
            shape (rows, length), on any device.
    """
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {
        name: batch[name].to(device) for name in ("input_ids", "attention_mask", "position_ids") if name in batch
    }
    targets = batch["labels"][:, 1:].to(device)
    wanted = targets != IGNORED
    logits = model(**inputs, use_cache=False).logits[:, :-1][wanted].float()
    nll = nn.functional.cross_entropy(logits, targets[wanted], reduction="none")
    return nll, wanted.nonzero()[:, 0]
