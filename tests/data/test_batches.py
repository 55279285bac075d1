from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from fedllm.data.batches import IGNORED, BatchOrder, collate, need_isolated_packing, packing_leak
from fedllm.data.tokens import TokenisedExample
from fedllm.errors import ConfigError
from fedllm.seeds import global_torch_stream


def example(*ids: int, given_tokens: int = 1) -> TokenisedExample:
    mask = tuple(i >= max(given_tokens, 1) for i in range(len(ids)))
    return TokenisedExample(ids, mask, truncated=False, target_bytes=len(ids))


EXAMPLES = [example(3, 4, 5, 6, given_tokens=2), example(7, 8), example(9, 10, 11, given_tokens=0), example(12, 13, 14)]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def llama(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        attn_implementation=request.param,
    )
    with global_torch_stream(0, "test"):
        return LlamaForCausalLM(config).eval()


def test_rows_are_padded_on_the_right() -> None:
    batch = collate(EXAMPLES[:2], pad_id=0)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6], [7, 8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 5, 6], [IGNORED, 8, IGNORED, IGNORED]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_padding_token_that_is_also_the_stop_token_is_still_a_target() -> None:
    batch = collate([example(5, 2), example(5, 6, 7, 2)], pad_id=2)
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED, IGNORED], [IGNORED, 6, 7, 2]]


def test_packed_rows_restart_positions_and_have_no_attention_mask() -> None:
    batch = collate(EXAMPLES, pad_id=0, packing=True, max_length=7)
    assert "attention_mask" not in batch, "transformers isolates packed examples only without one"
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 9, 10, 11], [12, 13, 14, 7, 8, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 1, 0, 1]]
    assert batch["example_ids"].tolist() == [[0, 0, 0, 0, 2, 2, 2], [3, 3, 3, 1, 1, -1, -1]]
    i = IGNORED
    assert batch["labels"].tolist() == [[i, i, 5, 6, i, 10, 11], [i, 13, 14, i, 8, i, i]]


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(LENGTHS, st.integers(9, 20))
def test_packing_keeps_every_token_once_within_the_length(lengths: list[int], max_length: int) -> None:
    examples = [example(*range(1, n + 1)) for n in lengths]
    packed, plain = collate(examples, pad_id=0, packing=True, max_length=max_length), collate(examples, pad_id=0)
    assert packed["input_ids"].shape[1] <= max_length
    assert len(packed["input_ids"]) <= len(examples)
    for i, one in enumerate(examples):
        assert packed["input_ids"][packed["example_ids"] == i].tolist() == list(one.input_ids)
    assert (packed["labels"] != IGNORED).sum() == (plain["labels"] != IGNORED).sum()


@settings(max_examples=15)
@given(lengths=LENGTHS)
def test_packed_logits_and_loss_are_those_of_the_examples_alone(llama: LlamaForCausalLM, lengths: list[int]) -> None:
    examples = [example(*((3 + 5 * i + j) % 32 for j in range(n))) for i, n in enumerate(lengths)]
    packed = collate(examples, pad_id=0, packing=True, max_length=16)
    with torch.no_grad():
        logits = llama(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits
        for i, one in enumerate(examples):
            alone = llama(input_ids=torch.tensor([one.input_ids])).logits[0]
            torch.testing.assert_close(logits[packed["example_ids"] == i], alone, atol=1e-5, rtol=0)


def test_packed_loss_is_the_padded_loss(llama: LlamaForCausalLM) -> None:
    packed = collate(EXAMPLES, pad_id=0, packing=True, max_length=7)
    packed.pop("example_ids")
    with torch.no_grad():
        losses = [float(llama(**batch, use_cache=False).loss) for batch in (packed, collate(EXAMPLES, pad_id=0))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_without_restarted_positions_packed_examples_do_see_one_another(llama: LlamaForCausalLM) -> None:
    """The control: what the isolation test measures is really there when isolation is off."""
    packed = collate(EXAMPLES, pad_id=0, packing=True, max_length=7)
    with torch.no_grad():
        joined = llama(input_ids=packed["input_ids"]).logits[packed["example_ids"] == 2]
        alone = llama(input_ids=torch.tensor([EXAMPLES[2].input_ids])).logits[0]
    assert (joined - alone).abs().max() > 1e-3


def test_families_that_ignore_restarted_positions_are_refused(llama: LlamaForCausalLM) -> None:
    small: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    with global_torch_stream(0, "test"):
        bloom = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=32, n_layer=2, n_head=4))
        opt = OPTForCausalLM(OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64))
    need_isolated_packing(llama)
    assert packing_leak(llama) < 1e-5
    for leaking in (bloom, opt):
        assert packing_leak(leaking) > 0.2
        with pytest.raises(ConfigError, match="BAD_COMBINATION"):
            need_isolated_packing(leaking)
        assert leaking.training, "the model's mode is left as it was"


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate([], pad_id=0)


SIZES = st.tuples(st.integers(1, 30), st.integers(1, 40))


@given(SIZES, st.integers(0, 3))
def test_every_epoch_holds_every_example_once(sizes: tuple[int, int], epoch: int) -> None:
    order = BatchOrder(*sizes, seed=1, party="north")
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    batches = [order.batch(step) for step in steps]
    assert sorted(i for batch in batches for i in batch) == list(range(sizes[0]))
    assert all(len(batch) == min(sizes) for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= sizes[1]


def test_a_batch_is_a_function_of_its_step_alone() -> None:
    asked_forwards = [BatchOrder(10, 3, seed=1, party="north").batch(step) for step in range(20)]
    backwards = BatchOrder(10, 3, seed=1, party="north")
    asked_backwards = [backwards.batch(step) for step in reversed(range(20))]
    assert asked_forwards == asked_backwards[::-1]


def test_epochs_seeds_and_parties_have_orders_of_their_own() -> None:
    orders = [
        BatchOrder(50, 50, seed=seed, party=party).batch(epoch)
        for seed, party, epoch in ((1, "north", 0), (1, "north", 1), (2, "north", 0), (1, "south", 0))
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_a_batch_larger_than_the_data_is_all_of_it() -> None:
    order = BatchOrder(5, 100, seed=1, party="north")
    assert order.steps_per_epoch == 1
    assert sorted(order.batch(7)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("num_examples", "batch_size"), [(0, 1), (1, 0)])
def test_an_order_of_nothing_is_refused(num_examples: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        BatchOrder(num_examples, batch_size, seed=1, party="north")
