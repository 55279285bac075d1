"""The loss of each target of a batch: what training and evaluation both sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

IGNORED = -100


def target_losses(model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (negative log-likelihoods in nats, row numbers), one of each per target, in float32.

    Args:
        model: As for `target_logits`.
        batch: As for `target_logits`.
    """
    logits, targets, rows = target_logits(model, batch)
    return nn.functional.cross_entropy(logits, targets, reduction="none"), rows


def target_logits(model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (logits in float32, targets, row numbers): shapes (T, words or labels), (T,), (T,) for T targets.

    Args:
        model: A model of transformers whose output has `logits`.
        batch: `input_ids`, `attention_mask`, perhaps `position_ids`, each of shape (rows, length), and `labels`
            (`IGNORED` = not a target): of the same shape for a causal language model, (rows, answer's length) for an
            encoder with a decoder, (rows,) for a classifier. On any device.
    """
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {
        name: batch[name].to(device) for name in ("input_ids", "attention_mask", "position_ids") if name in batch
    }
    labels = batch["labels"].to(device)
    if labels.dim() == 1:
        return model(**inputs).logits.float(), labels, torch.arange(len(labels), device=device)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        # Each family begins with a token of its own. The labels stay here: with them the model would sum a loss too.
        answers: Any = model.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator]
        logits = model(**inputs, decoder_input_ids=answers, use_cache=False).logits
    else:
        # Virtual tokens stand before the text, and nobody asks what follows them.
        length, labels = labels.shape[1], labels[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, -length:][:, :-1]
    wanted = labels != IGNORED
    return logits[:, -labels.shape[1] :][wanted].float(), labels[wanted], wanted.nonzero()[:, 0]
