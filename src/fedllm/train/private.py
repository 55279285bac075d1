"""Local training with noise: each unit's gradient is cut to a norm, the sum gets noise, and the optimiser sees that.

Source: Abadi et al. 2016, arXiv:1607.00133, algorithm 1, with Poisson samples. Differs: a step is divided by the
expected number of units and never by the real one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from fedllm.data.tokens import TokenisedExample
from fedllm.errors import RunFailed
from fedllm.privacy.rounds import PrivateRound
from fedllm.seeds import global_torch_stream
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.per_example import Gradients, PerExample, checked
from fedllm.train.supervised import check_deadline

# A unit's gradient is cut a little below the norm, so that rounding cannot lift it above.
_MARGIN = 1 + 1e-6


class PrivateTrainer:
    """DP-SGD, or with another optimiser what goes by its name: all of them see the noisy gradient alone."""

    is_private = True

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        """Return the number of steps, and nothing else of the round: losses and token counts have had no noise.

        Args:
            task: The round's work; `private` must be there.
            optimizer: Over the trainable parameters.

        Raises:
            ModelError: `GRADIENT_UNSURE`.
            RunFailed: `NONFINITE` or `ROUND_TIMEOUT`.
        """
        terms, model = task.private, task.model.model
        if terms is None:
            raise RuntimeError("private training was asked for without the terms of its noise")
        trained = {name: value for name, value in task.model.trainable.items() if value.requires_grad}
        optimizer.zero_grad()
        model.eval()
        gradients = checked(model, trained, pad_id=task.pad_id, example=task.examples[0])
        model.train()
        try:
            with global_torch_stream(task.seed, "dropout", task.party, task.round):
                for step in range(task.first_step, task.first_step + task.num_steps):
                    check_deadline(task)
                    _step(task, terms, gradients, optimizer, trained, step)
                    task.on_step(step - task.first_step + 1, task.num_steps)
        finally:
            model.eval()
        _check_finite(task, trained)
        return TrainSums(0.0, 0, 0, task.num_steps)


def _step(
    task: TrainTask,
    terms: PrivateRound,
    gradients: PerExample,
    optimizer: torch.optim.Optimizer,
    trained: Mapping[str, torch.nn.Parameter],
    step: int,
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = task.learning_rate(step)
    total = clipped_total(task, terms, gradients, trained, terms.sample(step))
    for name, parameter in trained.items():
        noise = torch.from_numpy(terms.normals(parameter.numel(), step, name)).reshape(parameter.shape)
        # In float64 to the end: the low bits of the noise must not tell where the sum ends.
        noisy = (total[name] + noise.to(parameter.device)) / terms.expected_units
        parameter.grad = noisy.to(parameter.dtype)
    _add_penalty(task, trained)
    for correct in task.corrections:
        correct(optimizer.param_groups[0]["lr"])
    optimizer.step()
    optimizer.zero_grad()


def clipped_total(
    task: TrainTask,
    terms: PrivateRound,
    gradients: PerExample,
    trained: Mapping[str, torch.nn.Parameter],
    units: Sequence[int],
) -> Gradients:
    """Return the sum of the units' gradients, each cut to the clip norm, in float64; zeros where there is no unit.

    Args:
        task: For the examples and the size of a forward pass.
        terms: The clip norm, and whose examples are whose.
        gradients: Of each example.
        trained: What is trained.
        units: Those drawn.
    """
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in trained.items()}
    for found in _unit_gradients(task, terms, gradients, units):
        for name, part in clipped_sum(found, terms.clip_norm).items():
            total[name] += part
    return total


def clipped_sum(gradients: Gradients, clip_norm: float) -> Gradients:
    """Return the sum over the first axis, each part cut to a norm over all tensors together; float64.

    A gradient that is not finite counts as zero: to stop the run for it would tell of the one who caused it.

    Args:
        gradients: Name -> (R, *shape).
        clip_norm: Largest L2 norm of a part.
    """
    squares = [part.double().flatten(1).square().sum(1) for part in gradients.values()]
    norms = torch.stack(squares).sum(0).sqrt()
    sound = norms.isfinite()
    factors = (clip_norm / (norms[sound] * _MARGIN).clamp_min(1e-300)).clamp(max=1.0)
    return {name: torch.tensordot(factors, part[sound].double(), dims=1) for name, part in gradients.items()}


def _unit_gradients(
    task: TrainTask, terms: PrivateRound, gradients: PerExample, units: Sequence[int]
) -> Iterator[Gradients]:
    """Yield gradients of units, (units, *shape): many of one example each at a time, or one of many examples."""
    size = task.settings.per_device_train_batch_size
    single = [terms.units[unit][0] for unit in units if len(terms.units[unit]) == 1]
    # Rows of about one length need little padding.
    single.sort(key=lambda index: (len(task.examples[index].input_ids), index))
    for start in range(0, len(single), size):
        yield gradients([task.examples[index] for index in single[start : start + size]])
    for unit in units:
        own = [task.examples[index] for index in terms.units[unit]]
        if len(own) > 1:
            yield _mean_gradient(gradients, own, size)


def _mean_gradient(gradients: PerExample, rows: Sequence[TokenisedExample], size: int) -> Gradients:
    total: Gradients = {}
    for start in range(0, len(rows), size):
        for name, part in gradients(rows[start : start + size]).items():
            found = part.sum(0, keepdim=True) / len(rows)
            total[name] = total[name] + found if name in total else found
    return total


def _add_penalty(task: TrainTask, trained: Mapping[str, torch.nn.Parameter]) -> None:
    """Add what a method asks beside the loss: a function of the parameters alone, so it needs no noise."""
    if (penalty := task.model.penalty()) is None:
        return
    found = torch.autograd.grad(penalty, list(trained.values()), allow_unused=True)
    for parameter, part in zip(trained.values(), found, strict=True):
        if part is not None and parameter.grad is not None:
            parameter.grad += part


def _check_finite(task: TrainTask, trained: Mapping[str, torch.nn.Parameter]) -> None:
    # What has had its noise may be looked at.
    if not all(bool(value.isfinite().all()) for value in trained.values()):
        raise RunFailed(
            "NONFINITE",
            "the parameters are not finite numbers after training with noise",
            where=f"party {task.party}, round {task.round}",
            fix="lower `learning_rate`, or raise `per_device_train_batch_size`",
        )
