"""Summed loss: against a loop of one token at a time, for any batching, and without side effects."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedllm.errors import RunFailed
from fedllm.evaluate.loss import LossSums, summed_loss
from fedllm.seeds import global_torch_stream, stream

VOCAB = 64


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=VOCAB,
        attention_dropout=0.3, max_position_embeddings=64,
    )  # fmt: skip
    with global_torch_stream(0, "model"):
        return LlamaForCausalLM(config).eval()


def examples(count: int) -> list[tuple[list[int], list[int]]]:
    draw = stream(1, "examples")
    rows = []
    for _ in range(count):
        ids = draw.integers(0, VOCAB, size=int(draw.integers(4, 20))).tolist()
        masked = int(draw.integers(1, len(ids)))
        rows.append((ids, [-100] * masked + ids[masked:]))
    return rows


def batches(rows: list[tuple[list[int], list[int]]], size: int) -> list[dict[str, Any]]:
    made = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = max(len(ids) for ids, _ in part)
        made.append(
            {
                "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part]),
                "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part]),
                "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in part]),
                "target_bytes": [3 * sum(label != -100 for label in labels) for _, labels in part],
            }
        )
    return made


def one_token_at_a_time(model: LlamaForCausalLM, rows: list[tuple[list[int], list[int]]]) -> float:
    total = 0.0
    with torch.no_grad():
        for ids, labels in rows:
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total -= sum(float(log_probs[i - 1, labels[i]]) for i in range(1, len(ids)) if labels[i] != -100)
    return total


def test_sums_equal_a_loop_of_one_token_at_a_time(model: LlamaForCausalLM) -> None:
    rows = examples(13)
    tokens = sum(label != -100 for _, labels in rows for label in labels)
    sums = summed_loss(model, batches(rows, 4))
    assert sums.nll_nats == pytest.approx(one_token_at_a_time(model, rows), rel=1e-5)
    assert (sums.tokens, sums.bytes, sums.examples) == (tokens, 3 * tokens, 13)
    assert sums.loss_nats == pytest.approx(sums.nll_nats / tokens)
    assert sums.perplexity_per_token == pytest.approx(math.exp(sums.nll_nats / tokens))
    assert sums.perplexity_per_byte == pytest.approx(math.exp(sums.nll_nats / (3 * tokens)))


@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_the_value_does_not_depend_on_the_batch_size(model: LlamaForCausalLM, size: int) -> None:
    rows = examples(13)
    whole, parts = summed_loss(model, batches(rows, 13)), summed_loss(model, batches(rows, size))
    assert parts.loss_nats == pytest.approx(whole.loss_nats, abs=1e-5)
    assert (parts.tokens, parts.bytes, parts.examples) == (whole.tokens, whole.bytes, whole.examples)


def test_two_examples_packed_in_a_row_give_the_sum_of_both(model: LlamaForCausalLM) -> None:
    (first, first_labels), (second, second_labels) = rows = examples(2)
    packed = {
        "input_ids": torch.tensor([first + second]),
        "labels": torch.tensor([[-100, *first_labels[1:], -100, *second_labels[1:]]]),
        "position_ids": torch.tensor([[*range(len(first)), *range(len(second))]]),
        "target_bytes": torch.tensor([5, 6]),
    }
    sums = summed_loss(model, [packed])
    assert sums.nll_nats == pytest.approx(one_token_at_a_time(model, rows), rel=1e-5)
    assert (sums.bytes, sums.examples) == (11, 2)


def test_a_bf16_model_is_summed_in_float32(model: LlamaForCausalLM) -> None:
    logits = torch.randn(1, 33, VOCAB, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, **_: object) -> Any:
            return type("Output", (), {"logits": logits})

    ids = torch.arange(33).unsqueeze(0)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="sum")
    assert summed_loss(Fixed(), [{"input_ids": ids, "labels": ids}]).nll_nats == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_each_module_keeps_its_mode_and_no_generator_moves(model: LlamaForCausalLM) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first, second = (summed_loss(model, batches(examples(5), 2)) for _ in range(2))
    assert first == second, "dropout was on"
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    model.eval()


def test_the_model_can_be_trained_after_an_evaluation(model: LlamaForCausalLM) -> None:
    batch = batches(examples(2), 2)[0]
    summed_loss(model, [batch])
    model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad()


def test_a_nan_names_the_place_and_restores_the_mode(model: LlamaForCausalLM) -> None:
    model.train()
    with torch.no_grad():
        kept = model.lm_head.weight[0, 0].item()
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(RunFailed, match="NONFINITE") as caught:
        summed_loss(model, batches(examples(3), 2), where="north, held_out")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = kept
    assert caught.value.where == "north, held_out"
    assert model.training
    model.eval()


def test_sums_add_and_the_empty_sum_is_no_number() -> None:
    left, right = LossSums(2.0, 4, 8, 1), LossSums(1.0, 2, 0, 3)
    assert left + right == LossSums(3.0, 6, 8, 4)
    assert sum([left, right], LossSums()) == left + right
    assert math.isnan(LossSums().loss_nats)
    assert math.isnan(LossSums().perplexity_per_byte)
    assert LossSums(1e9, 1, 1, 1).perplexity_per_token == math.inf


def test_no_batch_gives_the_zero(model: LlamaForCausalLM) -> None:
    assert summed_loss(model, []) == LossSums()
