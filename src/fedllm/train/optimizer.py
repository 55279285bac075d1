"""The local optimiser, its state as named tensors, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fedllm.train.settings import TrainSettings
from fedllm.wire.payload import Tensors


def make_optimizer(trainable: Mapping[str, torch.nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """Return the optimiser over the trainable parameters, in name order.

    Weight decay falls on tensors of two or more dimensions only, as in `transformers.Trainer` (no biases, no norms).

    Args:
        trainable: Parameters by name.
        settings: The job's `train` section.
    """
    decayed = [trainable[name] for name in sorted(trainable) if trainable[name].dim() > 1]
    others = [trainable[name] for name in sorted(trainable) if trainable[name].dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return OPTIMIZERS[settings.optim](groups, settings)


def _adamw(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon)


def _sgd(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=settings.learning_rate)


def _adafactor(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=settings.learning_rate)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], TrainSettings], torch.optim.Optimizer]] = {
    "adamw_torch": _adamw,
    "sgd": _sgd,
    "adafactor": _adafactor,
}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return copies of the optimiser's state on the CPU, as `index/key` -> tensor.

    Args:
        optimizer: From `make_optimizer`.
    """
    return {
        f"{index}/{key}": value.detach().to("cpu", copy=True)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set the optimiser's state from what `optimizer_tensors` returned.

    Args:
        optimizer: A fresh one from `make_optimizer`.
        tensors: The state.
    """
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def learning_rates(settings: TrainSettings, *, total_steps: int) -> Callable[[int], float]:
    """Return step -> learning rate over the whole run, by transformers' schedules.

    Args:
        settings: The job's `train` section.
        total_steps: Optimiser steps of the whole run at this party.
    """
    from transformers import get_scheduler

    share = settings.warmup_steps
    warmup = int(share) if share >= 1 else math.ceil(share * total_steps)
    carrier = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    scheduler = get_scheduler(
        settings.lr_scheduler_type, carrier, num_warmup_steps=warmup, num_training_steps=total_steps
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return lambda step: settings.learning_rate * factor(step)
