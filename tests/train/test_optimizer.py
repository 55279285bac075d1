"""The local optimiser: groups, state as tensors, and the learning rate over the whole run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import bits

from fedllm.train.optimizer import learning_rates, load_optimizer_tensors, make_optimizer, optimizer_tensors
from fedllm.train.settings import TrainSettings

OPTIMIZERS = ["adamw_torch", "sgd", "adafactor"]


def settings_of(**values: Any) -> TrainSettings:
    return TrainSettings.model_validate({"local_steps": 1} | values)


def parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b.weight": (3, 4), "a.bias": (4,), "a.weight": (5, 2), "c.norm": (2,)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def steps(optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter], count: int, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for name in sorted(named):
            named[name].grad = torch.randn(named[name].shape, generator=generator)
        optimizer.step()


def test_weight_decay_falls_on_matrices_only() -> None:
    named = parameters()
    optimizer = make_optimizer(named, settings_of(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]}
    assert decayed == {id(named["a.weight"]), id(named["b.weight"])}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_pulls_matrices_to_zero_and_nothing_else(name: str) -> None:
    ends = {}
    for decay in (0.0, 0.5):
        named = parameters()
        steps(make_optimizer(named, settings_of(optim=name, weight_decay=decay, learning_rate=0.01)), named, 3, seed=1)
        ends[decay] = {key: value.detach().clone() for key, value in named.items()}
    for key in ends[0.0]:
        assert torch.equal(ends[0.0][key], ends[0.5][key]) == (ends[0.0][key].dim() == 1)


def test_adamw_is_torch_s_with_the_job_s_constants() -> None:
    values = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-4, "learning_rate": 0.02, "weight_decay": 0.1}
    ours, theirs = parameters(), parameters()
    steps(make_optimizer(ours, settings_of(**values)), ours, 4, seed=2)
    groups = [
        {"params": [theirs["a.weight"], theirs["b.weight"]], "weight_decay": 0.1},
        {"params": [theirs["a.bias"], theirs["c.norm"]], "weight_decay": 0.0},
    ]
    steps(torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95), eps=1e-4), theirs, 4, seed=2)
    assert bits({k: v.detach() for k, v in ours.items()}) == bits({k: v.detach() for k, v in theirs.items()})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_goes_on_from_its_tensors_as_if_it_had_never_stopped(name: str) -> None:
    settings = settings_of(optim=name, learning_rate=0.01, weight_decay=0.1)
    unbroken = parameters()
    optimizer = make_optimizer(unbroken, settings)
    steps(optimizer, unbroken, 3, seed=1)
    kept = optimizer_tensors(optimizer)
    values = {key: value.detach().clone() for key, value in unbroken.items()}
    steps(optimizer, unbroken, 3, seed=2)

    broken = {key: torch.nn.Parameter(value) for key, value in values.items()}
    again = make_optimizer(broken, settings)
    load_optimizer_tensors(again, kept)
    steps(again, broken, 3, seed=2)
    assert bits({k: v.detach() for k, v in broken.items()}) == bits({k: v.detach() for k, v in unbroken.items()})
    assert bits(optimizer_tensors(again)) == bits(optimizer_tensors(optimizer))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_tensors_are_copies(name: str) -> None:
    named = parameters()
    optimizer = make_optimizer(named, settings_of(optim=name))
    steps(optimizer, named, 1, seed=1)
    kept = optimizer_tensors(optimizer)
    before = bits(kept)
    steps(optimizer, named, 2, seed=2)
    assert bits(kept) == before
    load_optimizer_tensors(optimizer, kept)
    steps(optimizer, named, 1, seed=3)
    assert bits(kept) == before


SCHEDULES = [
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
]


@pytest.mark.parametrize(
    ("schedule", "warmup"), [(s, w) for s in SCHEDULES for w in (0, 3, 0.1, 0.25) if s != "constant" or not w]
)
@pytest.mark.parametrize("total", [12, 25])
def test_the_learning_rate_is_that_of_transformers_trainer_at_every_step(
    schedule: str, warmup: float, total: int, tmp_path: Any
) -> None:
    from transformers import Trainer, TrainingArguments

    settings = settings_of(lr_scheduler_type=schedule, warmup_steps=float(warmup), learning_rate=3e-3)
    ours = learning_rates(settings, total_steps=total)

    model = torch.nn.Linear(2, 2)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=3e-3,
        lr_scheduler_type=schedule,
        warmup_steps=warmup,
        max_steps=total,
        use_cpu=True,
        report_to=[],
    )
    trainer = Trainer(model=model, args=arguments)
    trainer.create_optimizer_and_scheduler(num_training_steps=total)
    theirs = []
    for _ in range(total):
        theirs.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert [ours(step) for step in range(total)] == pytest.approx(theirs, rel=1e-12, abs=1e-18)


def test_the_learning_rate_is_a_function_of_the_step_alone() -> None:
    rate = learning_rates(settings_of(), total_steps=20)
    forwards = [rate(step) for step in range(20)]
    assert [rate(step) for step in reversed(range(20))] == forwards[::-1]
    assert forwards[0] == 2e-4
    assert forwards[-1] < 0.01 * forwards[0]


def test_the_smallest_learning_rates_have_every_schedule() -> None:
    for schedule in set(SCHEDULES) - {"polynomial"}:
        rate = learning_rates(settings_of(lr_scheduler_type=schedule, learning_rate=5e-8), total_steps=10)
        assert 0 <= rate(5) <= 5e-8
    with pytest.raises(ValidationError, match="polynomial"):
        settings_of(lr_scheduler_type="polynomial", learning_rate=5e-8)
