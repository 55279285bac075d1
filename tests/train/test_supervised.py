"""The local training loop: what a step computes, and what ends it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import bits

from fedllm.data.batches import BatchOrder
from fedllm.data.settings import DataSettings
from fedllm.data.tokens import TokenisedExample
from fedllm.errors import FedllmError
from fedllm.models.adapter import TunableModel
from fedllm.models.load import load_base
from fedllm.models.settings import ModelSettings, PeftSettings
from fedllm.train import supervised
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.optimizer import learning_rates, make_optimizer
from fedllm.train.settings import TrainSettings
from fedllm.train.supervised import SupervisedTrainer

MakeTask = Callable[..., TrainTask]


def examples_of(lengths: Sequence[int]) -> list[TokenisedExample]:
    """Return examples of these lengths; the first two tokens of each are given, the others targets."""
    draw = random.Random(3)
    return [
        TokenisedExample(tuple(draw.randrange(3, 290) for _ in range(n)), (False, False, *[True] * (n - 2)), False, n)
        for n in lengths
    ]


@pytest.fixture
def make_task(base: Path) -> MakeTask:
    def make(
        lengths: Sequence[int] = (6, 9, 4, 12, 5, 7, 8, 3),
        peft: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        **train: Any,
    ) -> TrainTask:
        model = load_base(ModelSettings(model_name_or_path=str(base)), folder=base).model
        tunable = TunableModel(model, PeftSettings(**{"r": 2, "target_modules": ["q_proj", "v_proj"]} | (peft or {})))
        tunable.write(tunable.initial(5))
        defaults = {"local_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 4}
        settings = TrainSettings.model_validate(defaults | train)
        return TrainTask(
            party="north",
            round=1,
            seed=9,
            model=tunable,
            examples=examples_of(lengths),
            order=BatchOrder(len(lengths), settings.per_device_train_batch_size, seed=9, party="north"),
            pad_id=0,
            settings=settings,
            data_settings=DataSettings(max_length=32, **data or {}),
            first_step=0,
            num_steps=settings.local_steps or 1,
            learning_rate=learning_rates(settings, total_steps=20),
            deadline=time.monotonic() + 600,
        )

    return make


def trained(task: TrainTask) -> tuple[TrainSums, dict[str, torch.Tensor]]:
    sums = SupervisedTrainer().train(task, make_optimizer(task.model.trainable, task.settings))
    return sums, task.model.read()


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0)


@pytest.mark.parametrize("normalization", ["tokens", "examples"])
def test_accumulated_small_batches_are_one_large_batch(normalization: str, make_task: MakeTask) -> None:
    same = {"optim": "sgd", "learning_rate": 0.5, "loss_normalization": normalization, "lr_scheduler_type": "constant"}
    whole = trained(make_task(per_device_train_batch_size=8, **same))
    for size, passes in ((4, 2), (2, 4), (1, 8)):
        parts = trained(make_task(per_device_train_batch_size=size, gradient_accumulation_steps=passes, **same))
        assert parts[0].tokens == whole[0].tokens
        assert parts[0].loss_nats == pytest.approx(whole[0].loss_nats, rel=1e-5)
        assert_close(parts[1], whole[1], atol=1e-5)


def test_a_step_is_the_gradient_of_the_stated_loss(make_task: MakeTask) -> None:
    """Plain torch, one example at a time without padding, on both normalisations."""
    for normalization in ("tokens", "examples"):
        values = {"optim": "sgd", "learning_rate": 0.3, "local_steps": 1, "max_grad_norm": 0}
        values |= {"lr_scheduler_type": "constant", "loss_normalization": normalization}
        task = make_task(per_device_train_batch_size=8, **values)
        start = task.model.read()
        _, end = trained(task)

        reference = make_task(per_device_train_batch_size=8, **values).model
        reference.model.eval()
        losses = []
        for example in task.examples:
            ids = torch.tensor([example.input_ids])
            log_probs = reference.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            picked = log_probs.gather(1, ids[0, 1:, None])[:, 0]
            losses.append(-picked[torch.tensor(example.loss_mask[1:])])
        if normalization == "tokens":
            loss = torch.cat(losses).mean()
        else:
            loss = torch.stack([nll.mean() for nll in losses]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        expected = {name: start[name] - 0.3 * p.grad for name, p in reference.trainable.items() if p.grad is not None}
        assert_close(end, expected, atol=1e-6)
        assert any((end[name] - start[name]).abs().max() > 1e-4 for name in end)


def test_the_two_normalisations_differ_where_lengths_differ(make_task: MakeTask) -> None:
    ends = [trained(make_task(optim="sgd", learning_rate=0.5, loss_normalization=n))[1] for n in ("tokens", "examples")]
    assert any((ends[0][name] - ends[1][name]).abs().max() > 1e-5 for name in ends[0])


def test_packing_is_no_packing(make_task: MakeTask) -> None:
    same = {"optim": "sgd", "learning_rate": 0.5}
    apart = trained(make_task(**same))
    packed = trained(make_task(data={"packing": True}, **same))
    assert packed[0].tokens == apart[0].tokens
    assert_close(packed[1], apart[1], atol=1e-5)


def test_gradient_checkpointing_gives_the_same_adapter(make_task: MakeTask) -> None:
    same = {"optim": "sgd", "learning_rate": 0.5, "local_steps": 3}
    plain = trained(make_task(peft={"lora_dropout": 0.2}, **same))
    again = trained(make_task(peft={"lora_dropout": 0.2}, gradient_checkpointing=True, **same))
    assert_close(again[1], plain[1], atol=1e-5)


def test_gradient_checkpointing_over_many_rounds_hangs_nothing_new_on_the_model(make_task: MakeTask) -> None:
    task = make_task(gradient_checkpointing=True, local_steps=1)
    optimizer, counts = make_optimizer(task.model.trainable, task.settings), set()
    for number in range(1, 4):
        SupervisedTrainer().train(replace(task, round=number, first_step=number - 1), optimizer)
        counts.add(sum(len(module._forward_hooks) for module in task.model.model.modules()))
    assert len(counts) == 1


def test_dropout_depends_on_round_party_and_seed_only(make_task: MakeTask) -> None:
    def end(**changes: Any) -> dict[str, bytes]:
        torch.rand(random.randrange(50))
        return bits(trained(replace(make_task(peft={"lora_dropout": 0.3}), **changes))[1])

    first = end()
    assert end() == first
    assert end(round=2) != first
    assert end(party="south") != first
    assert end(seed=10) != first


def test_without_dropout_party_and_round_play_no_part_beyond_the_order(make_task: MakeTask) -> None:
    first = bits(trained(make_task())[1])
    assert bits(trained(replace(make_task(), party="south", round=2))[1]) == first


def test_the_global_generators_are_left_as_they_were_and_not_used(make_task: MakeTask) -> None:
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        ends.append(bits(trained(make_task(peft={"lora_dropout": 0.3}))[1]))
        assert torch.equal(torch.random.get_rng_state(), before[0])
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert ends[0] == ends[1]


def test_the_sums_count_what_was_trained_on(make_task: MakeTask) -> None:
    task = make_task(local_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=3)
    sums, _ = trained(task)
    seen = [index for step in range(6) for index in task.order.batch(step)]
    assert (sums.steps, sums.examples) == (3, len(seen))
    assert sums.tokens == sum(task.examples[index].num_targets for index in seen)
    assert 3 < sums.loss_nats / sums.tokens < 8


def test_a_round_in_two_halves_is_the_whole_round(make_task: MakeTask) -> None:
    whole = make_task(local_steps=4)
    _, expected = trained(whole)
    task = make_task(local_steps=4)
    optimizer = make_optimizer(task.model.trainable, task.settings)
    for first in (0, 2):
        SupervisedTrainer().train(replace(task, first_step=first, num_steps=2), optimizer)
    assert bits(task.model.read()) == bits(expected)


def test_the_gradient_is_clipped_to_its_norm_over_all_parameters(make_task: MakeTask) -> None:
    values = {"optim": "sgd", "learning_rate": 1.0, "local_steps": 1, "lr_scheduler_type": "constant"}
    task = make_task(max_grad_norm=1e-3, **values)
    start = task.model.read()
    _, end = trained(task)
    moved = torch.cat([(end[name] - start[name]).flatten() for name in end])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


def spoil(task: TrainTask, value: float) -> None:
    with torch.no_grad():
        next(parameter for name, parameter in task.model.model.named_parameters() if "lm_head" in name).fill_(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_round_by_name(value: float, make_task: MakeTask) -> None:
    task = make_task()
    spoil(task, value)
    with pytest.raises(FedllmError) as caught:
        trained(task)
    assert (caught.value.code, caught.value.where) == ("NONFINITE", "party north, round 1")
    assert caught.value.fix


def test_a_gradient_that_is_not_finite_ends_the_round_before_it_reaches_the_adapter(make_task: MakeTask) -> None:
    for limit in (0.0, 1.0):
        task = make_task(max_grad_norm=limit)
        start = task.model.read()
        name = next(iter(task.model.trainable))
        task.model.trainable[name].register_hook(lambda gradient: gradient * float("nan"))
        optimizer = make_optimizer(task.model.trainable, task.settings)
        with pytest.raises(FedllmError, match="NONFINITE"):
            SupervisedTrainer().train(task, optimizer)
        assert bits(task.model.read()) == bits(start)
        assert not optimizer.state


def test_what_a_failed_round_left_behind_does_not_reach_the_next_party(make_task: MakeTask) -> None:
    _, expected = trained(make_task())
    task = make_task()
    sound = {name: p.detach().clone() for name, p in task.model.model.named_parameters() if "lm_head" in name}
    spoil(task, float("nan"))
    with pytest.raises(FedllmError):
        trained(task)
    with torch.no_grad():
        for name, parameter in task.model.model.named_parameters():
            if name in sound:
                parameter.copy_(sound[name])
    assert bits(trained(task)[1]) == bits(expected)


def test_a_round_out_of_time_ends_by_name_and_leaves_evaluation_mode(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(local_steps=5)
    seen: list[int] = []
    monkeypatch.setattr(supervised, "time", SimpleNamespace(monotonic=lambda: 0.5 * len(seen)))

    def slow(step: int, num_steps: int) -> None:
        seen.append(step)

    late = replace(task, deadline=1.0, on_step=slow)
    with pytest.raises(FedllmError) as caught:
        trained(late)
    assert caught.value.code == "ROUND_TIMEOUT"
    assert len(seen) == 3
    assert not task.model.model.training


def test_bfloat16_is_refused_where_the_machine_has_none(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "has_bf16", lambda device: False)
    with pytest.raises(FedllmError) as caught:
        trained(make_task(bf16=True))
    assert caught.value.code == "DEVICE_MISSING"


def test_bfloat16_trains_near_float32_and_the_adapter_stays_float32(make_task: MakeTask) -> None:
    if not supervised.has_bf16(torch.device("cpu")):
        pytest.skip("this machine has no bfloat16")
    same = {"optim": "sgd", "learning_rate": 0.5}
    plain, half = trained(make_task(**same)), trained(make_task(bf16=True, **same))
    assert {tensor.dtype for tensor in half[1].values()} == {torch.float32}
    assert half[0].loss_nats == pytest.approx(plain[0].loss_nats, rel=0.02)
    assert half[0].loss_nats != plain[0].loss_nats
    assert_close(half[1], plain[1], atol=0.01)


def test_the_learning_rate_of_each_step_is_that_of_the_run(make_task: MakeTask) -> None:
    task = make_task(local_steps=3)
    optimizer, seen = make_optimizer(task.model.trainable, task.settings), []
    late = replace(task, first_step=6, on_step=lambda *_: seen.append({g["lr"] for g in optimizer.param_groups}))
    SupervisedTrainer().train(late, optimizer)
    assert seen == [{task.learning_rate(step)} for step in (6, 7, 8)]
