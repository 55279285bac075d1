"""DP-SGD as the paper has it, one example at a time: slow, and plain enough to compare with."""

from __future__ import annotations

from collections import Counter

import torch

from fedllm.data.batches import collate
from fedllm.models.loss import target_losses
from fedllm.seeds import torch_generator
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.supervised import step_batches


class ReferenceDP:
    """Abadi et al. 2016, arXiv:1607.00133, algorithm 1, over the batches of the task.

    Args:
        clip_norm: C, the most that one example's gradient may weigh.
        noise_multiplier: sigma; the noise of the sum has the standard deviation sigma C.
    """

    def __init__(self, *, clip_norm: float, noise_multiplier: float) -> None:
        self._clip, self._noise = clip_norm, noise_multiplier

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        parameters = list(task.model.trainable.values())
        for step in range(task.first_step, task.first_step + task.num_steps):
            rows = [row for rows in step_batches(task, step) for row in rows]
            total = [torch.zeros_like(parameter) for parameter in parameters]
            # Copies of an example have one gradient, and each of them is clipped by itself.
            for row, copies in Counter(rows).items():
                nll, _ = target_losses(task.model.model, collate([row], pad_id=task.pad_id))
                gradient = torch.autograd.grad(nll.mean(), parameters)
                norm = torch.sqrt(sum((part**2).sum() for part in gradient))
                for sum_, part in zip(total, gradient, strict=True):
                    sum_.add_(part * (copies * min(1.0, self._clip / float(norm))))
            draws = torch_generator(task.seed, "reference noise", task.party, step)
            for parameter, sum_ in zip(parameters, total, strict=True):
                noise = torch.randn(sum_.shape, generator=draws) * self._noise * self._clip
                # By a number that does not depend on who is there.
                parameter.grad = (sum_ + noise) / task.settings.per_device_train_batch_size
            for group in optimizer.param_groups:
                group["lr"] = task.learning_rate(step)
            optimizer.step()
        return TrainSums(0.0, 1, 1, task.num_steps)
