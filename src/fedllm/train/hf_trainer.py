"""A `transformers.Trainer` subclass of your own as the local trainer, without a change to fedllm."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from fedllm.data.batches import collate
from fedllm.data.tokens import TokenisedExample
from fedllm.errors import ConfigError, RunFailed
from fedllm.seeds import global_torch_stream
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.supervised import check_deadline, prepare_model, step_batches


class HFTrainer:
    """Runs a `transformers.Trainer` (or a subclass of it) for the steps of each round.

    The examples come in the round's own order, the optimiser and the learning rate are the federation's, so that
    resuming and determinism hold; the subclass decides how a step is computed (`compute_loss`, `training_step`).
    Each call of `train()` costs transformers about 0.2 s.

    Args:
        trainer_class: `transformers.Trainer` or a subclass.
        arguments: More `TrainingArguments`, for example `{"label_smoothing_factor": 0.1}`.
        options: More keyword arguments of the class.
    """

    def __init__(self, trainer_class: type[Any], *, arguments: dict[str, Any] | None = None, **options: Any) -> None:
        self._class, self._arguments, self._options = trainer_class, arguments or {}, options
        if clash := _OURS & self._arguments.keys():
            raise ConfigError(
                "BAD_COMBINATION",
                f"{', '.join(sorted(clash))} is set by the job",
                where="HFTrainer(arguments=...)",
                fix="set it in the job's `train` section",
            )

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        """Return the sums of the round; see `LocalTrainer`."""
        prepare_model(task)
        micro = [
            rows
            for step in range(task.first_step, task.first_step + task.num_steps)
            for rows in step_batches(task, step)
        ]
        sums = _Sums()
        with tempfile.TemporaryDirectory() as folder, global_torch_stream(task.seed, "dropout", task.party, task.round):
            trainer = self._build(task, optimizer, micro, sums, folder)
            trainer.train()
        task.model.model.eval()
        optimizer.zero_grad()
        loss = trainer.state.log_history[-1].get("train_loss", 0.0)
        if not torch.isfinite(torch.tensor(loss)):
            raise RunFailed("NONFINITE", "the training loss is not a finite number", where=f"party {task.party}")
        return TrainSums(loss * sums.tokens, sums.tokens, sums.examples, task.num_steps)

    def _build(
        self,
        task: TrainTask,
        optimizer: torch.optim.Optimizer,
        micro: list[list[TokenisedExample]],
        sums: _Sums,
        folder: str,
    ) -> Any:
        from transformers import TrainingArguments

        settings = task.settings
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=task.num_steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            learning_rate=settings.learning_rate,
            max_grad_norm=settings.max_grad_norm,
            bf16=settings.bf16,
            use_cpu=next(task.model.model.parameters()).device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
            seed=task.seed % 2**32,
            **self._arguments,
        )
        # An item of the data set is a whole micro-batch, so that its order and size are those of the round.
        trainer = self._class(
            model=task.model.model,
            args=arguments,
            train_dataset=_Batches(micro),
            data_collator=_Collator(task, sums),
            optimizers=(optimizer, _schedule(task, optimizer)),
            **self._options,
        )
        trainer.add_callback(_steps_callback(task, optimizer))
        return trainer


_OURS = frozenset(
    {
        "output_dir",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "max_grad_norm",
        "bf16",
        "seed",
        "lr_scheduler_type",
        "warmup_steps",
        "optim",
        "train_sampling_strategy",
    }
)


class _Sums:
    tokens = 0
    examples = 0


class _Batches(torch.utils.data.Dataset[list[TokenisedExample]]):
    def __init__(self, batches: list[list[TokenisedExample]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> list[TokenisedExample]:
        return self._batches[index]


class _Collator:
    def __init__(self, task: TrainTask, sums: _Sums) -> None:
        self._task, self._sums = task, sums

    def __call__(self, items: list[list[TokenisedExample]]) -> dict[str, torch.Tensor]:
        rows = [example for item in items for example in item]
        settings = self._task.data_settings
        batch = collate(rows, pad_id=self._task.pad_id, packing=settings.packing, max_length=settings.max_length)
        self._sums.examples += len(rows)
        self._sums.tokens += sum(example.num_targets for example in rows)
        kept = ("input_ids", "attention_mask", "position_ids", "labels")
        return {name: batch[name] for name in kept if name in batch}


def _schedule(task: TrainTask, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = task.settings.learning_rate
    peak = task.settings.learning_rate
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: task.learning_rate(task.first_step + step) / peak)


def _steps_callback(task: TrainTask, optimizer: torch.optim.Optimizer) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for correct in task.corrections:
                correct(optimizer.param_groups[0]["lr"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            task.on_step(state.global_step, task.num_steps)
            check_deadline(task)

    return Steps()
