"""Supervised local training: a plain loop, because `transformers.Trainer` costs 0.2 s a call and we call each round."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fedllm.data.batches import collate
from fedllm.data.tokens import TokenisedExample
from fedllm.errors import ResourceError, RunFailed
from fedllm.models.loss import target_losses
from fedllm.seeds import global_torch_stream
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.settings import TrainSettings

Batch = dict[str, torch.Tensor]


class SupervisedTrainer:
    """Cross-entropy on the target tokens, with accumulation, clipping and autocast."""

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        """Return the sums of the round; see `LocalTrainer`."""
        model = task.model.model
        prepare_model(task)
        loss_sum, tokens, examples = 0.0, 0, 0
        # Parties share the parameters: what a failed step left in their gradients is not this party's.
        optimizer.zero_grad()
        model.train()
        try:
            with global_torch_stream(task.seed, "dropout", task.party, task.round):
                for step in range(task.first_step, task.first_step + task.num_steps):
                    check_deadline(task)
                    batches = list(step_batches(task, step))
                    for group in optimizer.param_groups:
                        group["lr"] = task.learning_rate(step)
                    step_loss, step_tokens = _optimizer_step(task, optimizer, batches)
                    loss_sum, tokens = loss_sum + step_loss, tokens + step_tokens
                    examples += sum(len(rows) for rows in batches)
                    task.on_step(step - task.first_step + 1, task.num_steps)
        finally:
            model.eval()
        return TrainSums(loss_sum, tokens, examples, task.num_steps)


def check_deadline(task: TrainTask) -> None:
    """Raise when the round's time is over.

    Args:
        task: The round's work.

    Raises:
        RunFailed: `ROUND_TIMEOUT`.
    """
    if time.monotonic() > task.deadline:
        raise RunFailed(
            "ROUND_TIMEOUT",
            "local training did not finish within federation.round_timeout",
            where=f"party {task.party}, round {task.round}",
            fix="raise `round_timeout`, or lower `local_steps`",
        )


def prepare_model(task: TrainTask) -> None:
    """Switch on what the settings ask of the model.

    Args:
        task: The round's work.

    Raises:
        ResourceError: `DEVICE_MISSING`, bfloat16 asked for on hardware without it.
    """
    model = task.model.model
    check_precision(task.settings, next(model.parameters()).device)
    is_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if task.settings.gradient_checkpointing and not is_on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()


def check_precision(settings: TrainSettings, device: torch.device) -> None:
    """Raise when a device lacks the precision that the settings ask for.

    Args:
        settings: The job's `train` section.
        device: Where the model is.

    Raises:
        ResourceError: `DEVICE_MISSING`.
    """
    if settings.bf16 and not has_bf16(device):
        raise ResourceError(
            "DEVICE_MISSING", "this hardware has no bfloat16", where="train.bf16", fix="set `train.bf16: false`"
        )


def has_bf16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16.

    Args:
        device: Where the model is.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def step_batches(task: TrainTask, step: int) -> Iterator[list[TokenisedExample]]:
    """Yield the examples of one optimiser step, a list per forward pass.

    Args:
        task: The round's work.
        step: The optimiser step, counted over the whole run.
    """
    passes = task.settings.gradient_accumulation_steps
    for micro in range(step * passes, (step + 1) * passes):
        yield [task.examples[index] for index in task.order.batch(micro)]


def _optimizer_step(
    task: TrainTask, optimizer: torch.optim.Optimizer, batches: list[list[TokenisedExample]]
) -> tuple[float, int]:
    total_tokens = sum(example.num_targets for rows in batches for example in rows)
    total_examples = sum(len(rows) for rows in batches)
    summed = 0.0
    for rows in batches:
        with _autocast(task):
            batch = _collate(task, rows)
            nll, row = target_losses(task.model.model, batch)
        if task.settings.loss_normalization == "tokens":
            loss = nll.sum() / total_tokens
        else:
            per_row = torch.zeros(len(rows), device=nll.device).index_add(0, row, torch.ones_like(nll))
            loss = (nll / per_row[row]).sum() / total_examples
        if rows is batches[0] and (penalty := task.model.penalty()) is not None:
            loss = loss + penalty
        loss.backward()  # type: ignore[no-untyped-call]
        summed += float(nll.detach().sum())
    limit = task.settings.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(task.model.trainable.values(), limit)
    _check_finite(task, summed, float(norm))
    for correct in task.corrections:
        correct(optimizer.param_groups[0]["lr"])
    optimizer.step()
    optimizer.zero_grad()
    return summed, total_tokens


def _collate(task: TrainTask, rows: list[TokenisedExample]) -> Batch:
    settings = task.data_settings
    return collate(rows, pad_id=task.pad_id, packing=settings.packing, max_length=settings.max_length)


def _autocast(task: TrainTask) -> AbstractContextManager[Any]:
    if not task.settings.bf16:
        return nullcontext()
    device = next(task.model.model.parameters()).device
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _check_finite(task: TrainTask, loss_sum: float, gradient_norm: float) -> None:
    if not math.isfinite(loss_sum) or not math.isfinite(gradient_norm):
        raise RunFailed(
            "NONFINITE",
            "the training loss or its gradient is not a finite number",
            where=f"party {task.party}, round {task.round}",
            fix="lower `learning_rate`, or set `max_grad_norm`",
        )
