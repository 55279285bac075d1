"""Private training: the gradient of each example, the bound on what it adds, the samples and the noise."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import bits

from fedllm.data.batches import BatchOrder
from fedllm.data.settings import DataSettings
from fedllm.data.tokens import TokenisedExample
from fedllm.errors import FedllmError
from fedllm.models.adapter import TunableModel
from fedllm.models.load import load_base
from fedllm.models.loss import target_losses
from fedllm.models.settings import ModelSettings, PeftSettings
from fedllm.privacy.noise import NoiseStream
from fedllm.privacy.rounds import PrivateRound
from fedllm.train import per_example
from fedllm.train.base import TrainTask
from fedllm.train.optimizer import learning_rates, make_optimizer
from fedllm.train.per_example import at_once, checked
from fedllm.train.private import PrivateTrainer, clipped_sum, clipped_total
from fedllm.train.settings import TrainSettings

KEY = bytes(range(32))
LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": LORA,
    "DoRA": LORA | {"use_dora": True},
    "IA3": {"peft_type": "IA3"},
    "AdaLoRA": {"peft_type": "ADALORA", "target_modules": ["q_proj", "v_proj"]},
    "VeRA": {"peft_type": "VERA", "target_modules": ["q_proj", "o_proj"], "r": 4},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
    "norms": {"peft_type": "LN_TUNING"},
}


def examples_of(lengths: Sequence[int], seed: int = 3) -> list[TokenisedExample]:
    draw = random.Random(seed)
    return [
        TokenisedExample(tuple(draw.randrange(3, 290) for _ in range(n)), (False, False, *[True] * (n - 2)), False, n)
        for n in lengths
    ]


def terms(num_examples: int, *, labels: tuple[str | int, ...] = (1,), **changes: Any) -> PrivateRound:
    values = {"sampling_rate": 0.5, "noise_multiplier": 1.0, "clip_norm": 0.5}
    units = [(index,) for index in range(num_examples)]
    return PrivateRound(**{"units": units, "noise": NoiseStream(KEY, *labels)} | values | changes)


def make_task(
    base: Path, lengths: Sequence[int] = (6, 9, 4, 12, 5, 7, 8, 3), *, peft: Mapping[str, Any] = LORA, **train: Any
) -> TrainTask:
    model = load_base(ModelSettings(model_name_or_path=str(base)), folder=base).model
    tunable = TunableModel(model, PeftSettings(**peft))
    tunable.write(tunable.initial(5))
    defaults = {"local_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 4}
    chosen = TrainSettings.model_validate(defaults | train)
    return TrainTask(
        party="north",
        round=1,
        seed=9,
        model=tunable,
        examples=examples_of(lengths),
        order=BatchOrder(len(lengths), chosen.per_device_train_batch_size, seed=9, party="north"),
        pad_id=0,
        settings=chosen,
        data_settings=DataSettings(max_length=32),
        first_step=0,
        num_steps=chosen.local_steps or 1,
        learning_rate=learning_rates(chosen, total_steps=20),
        deadline=time.monotonic() + 600,
        private=terms(len(lengths)),
    )


def moved(model: TunableModel) -> TunableModel:
    """Return the model with values that make every gradient differ from zero."""
    draw = torch.Generator().manual_seed(2)
    model.write({name: t + 0.1 * torch.randn(t.shape, generator=draw) for name, t in model.read().items()})
    return model


def trained(task: TrainTask) -> dict[str, bytes]:
    model = task.model
    model.write(model.initial(5))
    PrivateTrainer().train(task, make_optimizer(model.trainable, task.settings))
    return bits(model.read())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_a_batch_are_those_of_each_example_by_itself(base: Path, method: str) -> None:
    task = make_task(base, peft=METHODS[method])
    model = moved(task.model).model.eval()
    rows = task.examples[:4]
    found = at_once(model, task.model.trainable, pad_id=0)(rows)
    for number, row in enumerate(rows):
        ids = torch.tensor([row.input_ids])
        batch = {"input_ids": ids, "labels": torch.where(torch.tensor([row.loss_mask]), ids, -100)}
        loss = target_losses(model, batch)[0].mean()
        expected = torch.autograd.grad(loss, list(task.model.trainable.values()))
        for name, part in zip(task.model.trainable, expected, strict=True):
            assert found[name].shape == (4, *part.shape)
            assert float((found[name][number] - part).norm()) <= 1e-4 * float(part.norm()) + 1e-7, name
            assert float(part.norm()) > 0, name
    way = checked(model, task.model.trainable, pad_id=0, example=rows[0])
    assert "at_once" in way.__qualname__


def test_a_quick_way_that_is_wrong_is_not_taken(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(base)
    right = per_example.at_once(task.model.model, task.model.trainable, pad_id=0)

    def wrong(spoil: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> str:
        monkeypatch.setattr(per_example, "at_once", lambda *_, **__: lambda rows: spoil(right(rows)))
        way = checked(task.model.model.eval(), task.model.trainable, pad_id=0, example=task.examples[0])
        return way.__qualname__

    assert "one_by_one" not in wrong(lambda found: found)
    last = sorted(task.model.trainable)[-1]
    assert "one_by_one" in wrong(lambda found: {name: part for name, part in found.items() if name != last})
    assert "one_by_one" in wrong(lambda found: found | {last: found[last][:1]})
    assert "one_by_one" in wrong(lambda found: found | {last: found[last] * 1.001})
    assert "one_by_one" in wrong(lambda found: found | {last: found[last].flip(0)})


def test_what_has_no_part_in_the_loss_is_refused(base: Path) -> None:
    task = make_task(base)
    idle = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(FedllmError) as caught:
        checked(task.model.model.eval(), {**task.model.trainable, "idle": idle}, pad_id=0, example=task.examples[0])
    assert caught.value.code == "GRADIENT_UNSURE"
    task.model.model.add_module("norm", torch.nn.BatchNorm1d(3))
    with pytest.raises(FedllmError, match="E07"):
        checked(task.model.model, task.model.trainable, pad_id=0, example=task.examples[0])


def norm_of(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(left[name] - right[name]).flatten() for name in left]).norm())


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.floats(0.01, 10))
@settings(max_examples=60)
def test_one_gradient_more_moves_the_sum_by_no_more_than_the_clip_norm(seed: int, scale: float, clip: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (5, 3, 2), "b": (5, 4)}
    found = {name: torch.randn(shape, generator=draw) * scale for name, shape in shapes.items()}
    without = {name: part[:-1] for name, part in found.items()}
    assert norm_of(clipped_sum(found, clip), clipped_sum(without, clip)) <= clip


def test_a_changed_example_moves_the_sum_by_no_more_than_twice_the_clip_norm(base: Path) -> None:
    task = make_task(base)
    model = moved(task.model)
    way = at_once(model.model.eval(), model.trainable, pad_id=0)

    def total(examples: Sequence[TokenisedExample], units: Sequence[int], clip: float) -> dict[str, torch.Tensor]:
        limits = terms(len(examples), clip_norm=clip)
        return clipped_total(replace(task, examples=examples), limits, way, model.trainable, units)

    units, free = list(range(8)), 1e9
    for seed in range(2):
        other = [*task.examples[:7], *examples_of([4 + seed], seed=seed)]
        for clip in (0.05,):
            assert norm_of(total(task.examples, units, clip), total(task.examples, units[:7], clip)) <= clip
            assert norm_of(total(task.examples, units, clip), total(other, units, clip)) <= 2 * clip
        # Without the clip, the same example moves the sum by more than any of these: the bound is the clip's doing.
        assert norm_of(total(task.examples, units, free), total(task.examples, units[:7], free)) > 0.05


def test_a_gradient_that_is_not_finite_counts_as_zero() -> None:
    found = {"a": torch.tensor([[3.0, 4.0], [float("nan"), 1.0], [float("inf"), 0.0]])}
    torch.testing.assert_close(clipped_sum(found, 1.0)["a"], torch.tensor([0.6, 0.8]).double(), rtol=1e-5, atol=0)


def test_a_person_is_one_unit_however_many_examples_are_theirs(base: Path) -> None:
    task = make_task(base, per_device_train_batch_size=2)
    model = moved(task.model)
    way = at_once(model.model.eval(), model.trainable, pad_id=0)
    limits = terms(8, units=[(0, 3, 5, 6, 7), (1,), (2, 4)], clip_norm=0.05)
    with_all = clipped_total(task, limits, way, model.trainable, [0, 1, 2])
    assert norm_of(with_all, clipped_total(task, limits, way, model.trainable, [1, 2])) <= 0.05
    # As examples of their own, the five would weigh more than one person may.
    single = terms(8, clip_norm=0.05)
    five = clipped_total(task, single, way, model.trainable, [0, 3, 5, 6, 7])
    assert float(torch.cat([part.flatten() for part in five.values()]).norm()) > 0.05
    free = clipped_total(task, replace(limits, clip_norm=1e9), way, model.trainable, [2])
    two = way([task.examples[2], task.examples[4]])
    for name, part in free.items():
        torch.testing.assert_close(part, two[name].mean(0).double(), rtol=1e-5, atol=1e-8)


def test_a_step_is_the_noisy_sum_by_the_expected_number_of_units(base: Path) -> None:
    task = make_task(base, local_steps=1, optim="sgd", lr_scheduler_type="constant", learning_rate=1.0)
    model, private_ = task.model, task.private
    assert private_ is not None and private_.expected_units == 4
    start = model.read()
    private_ = replace(private_, noise=NoiseStream(KEY, "a sample of another size"))
    units = private_.sample(0)
    assert len(units) != 4
    task = replace(task, private=private_)
    total = clipped_total(
        task, private_, at_once(model.model.eval(), model.trainable, pad_id=0), model.trainable, units
    )
    PrivateTrainer().train(task, make_optimizer(model.trainable, task.settings))
    for name, tensor in model.read().items():
        noise = torch.from_numpy(private_.normals(tensor.numel(), 0, name)).reshape(tensor.shape)
        expected = start[name] - ((total[name] + noise) / 4).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)


def test_an_empty_sample_is_a_step_of_pure_noise(base: Path) -> None:
    task = make_task(base, local_steps=1, optim="sgd", lr_scheduler_type="constant", learning_rate=1.0)
    never = replace(task, private=replace(task.private or terms(8), sampling_rate=1e-9))
    start = task.model.read()
    assert never.private is not None and never.private.sample(0) == []
    PrivateTrainer().train(never, make_optimizer(task.model.trainable, task.settings))
    step = torch.cat([(task.model.read()[name] - start[name]).flatten() for name in start]).double()
    scale = 0.5 / (8 * 1e-9)
    assert abs(float(step.std()) / scale - 1) < 0.15


def test_the_same_key_and_labels_give_the_same_bits_and_others_give_others(base: Path) -> None:
    task = make_task(base, peft=LORA | {"lora_dropout": 0.1})
    expected = trained(task)
    assert trained(task) == expected
    assert trained(replace(task, private=terms(8, labels=(2,)))) != expected
    assert trained(replace(task, private=terms(8, noise=NoiseStream(bytes(32), 1)))) != expected


def test_nothing_of_the_round_is_told_but_its_steps(base: Path) -> None:
    task = make_task(base)
    sums = PrivateTrainer().train(task, make_optimizer(task.model.trainable, task.settings))
    assert (sums.loss_nats, sums.tokens, sums.examples, sums.steps) == (0.0, 0, 0, 2)


def test_corrections_and_penalties_come_after_the_noise(base: Path) -> None:
    seen: list[float] = []
    task = make_task(base, peft=METHODS["AdaLoRA"], local_steps=1)
    limits = replace(task.private or terms(8), clip_norm=1e-9)

    def look(rate: float) -> None:
        seen.append(float(sum(p.grad.norm() for p in task.model.trainable.values() if p.grad is not None)))

    moved(task.model)
    PrivateTrainer().train(
        replace(task, private=limits, corrections=[look]), make_optimizer(task.model.trainable, task.settings)
    )
    # All that is left of the loss and the noise is next to nothing: this is AdaLoRA's own penalty.
    assert seen[0] > 1e-3
    task.model.penalty = lambda: None  # type: ignore[method-assign]
    PrivateTrainer().train(
        replace(task, private=limits, corrections=[look]), make_optimizer(task.model.trainable, task.settings)
    )
    assert seen[1] < 1e-6


def test_training_without_terms_is_no_private_training(base: Path) -> None:
    task = replace(make_task(base), private=None)
    with pytest.raises(RuntimeError, match="without the terms"):
        PrivateTrainer().train(task, make_optimizer(task.model.trainable, task.settings))


def test_an_overdue_round_ends(base: Path) -> None:
    task = replace(make_task(base), deadline=time.monotonic() - 1)
    with pytest.raises(FedllmError) as caught:
        PrivateTrainer().train(task, make_optimizer(task.model.trainable, task.settings))
    assert caught.value.code == "ROUND_TIMEOUT"


def test_each_unit_is_drawn_at_the_rate_and_by_itself() -> None:
    limits = terms(400, sampling_rate=0.05)
    drawn = np.zeros((500, 400))
    for step in range(500):
        drawn[step, limits.sample(step)] = 1
    assert abs(drawn.mean() / 0.05 - 1) < 0.02
    # The number in a step varies as it does for independent draws: fixed batches would not vary at all.
    assert abs(drawn.sum(1).var() / (400 * 0.05 * 0.95) - 1) < 0.25
    assert drawn.sum(0).min() > 5 and drawn.sum(0).max() < 60
    assert terms(400, sampling_rate=1.0).sample(3) == list(range(400))
