from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.data.formats import Example
from fedllm.data.read import read_party_data, split_held_out
from fedllm.data.settings import DataSettings, DataSource
from fedllm.errors import DataError

PAIRS = [{"prompt": f"问题 {i}", "completion": f"答案 {i}"} for i in range(5)]
EXAMPLES = tuple(Example(prompt=pair["prompt"], completion=pair["completion"]) for pair in PAIRS)
Write = Callable[..., Path]


@given(
    st.lists(st.integers(0, 12), max_size=60).map(lambda ids: [0, *ids, 1]),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_equal_examples_stay_together_and_both_sides_have_some(ids: list[int], share: float, seed: int) -> None:
    examples = [Example(text=f"text {i}") for i in ids]
    train, held_out = split_held_out(examples, share, seed=seed, party="north")
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    assert sorted(e.text or "" for e in train + held_out) == sorted(e.text or "" for e in examples)
    assert (train, held_out) == split_held_out(examples, share, seed=seed, party="north")


def test_the_share_is_met_without_duplicates_and_depends_on_seed_and_party() -> None:
    examples = [Example(text=f"text {i}") for i in range(200)]
    splits = [split_held_out(examples, 0.1, seed=s, party=p)[1] for s, p in ((0, "a"), (1, "a"), (0, "b"))]
    assert [len(held_out) for held_out in splits] == [20, 20, 20]
    assert len(set(splits)) == 3


def test_many_duplicates_of_one_example_do_not_swallow_the_training_side() -> None:
    examples = [Example(text="same")] * 90 + [Example(text=f"text {i}") for i in range(10)]
    for seed in range(20):
        train, held_out = split_held_out(examples, 0.1, seed=seed, party="north")
        assert len(held_out) == 10
        assert len(train) == 90


def test_share_zero_holds_out_nothing() -> None:
    assert split_held_out(EXAMPLES, 0, seed=0, party="north") == (EXAMPLES, ())


@pytest.mark.parametrize("examples", [(), EXAMPLES[:1], EXAMPLES[:1] * 5])
def test_too_few_different_examples_cannot_be_split(examples: tuple[Example, ...]) -> None:
    with pytest.raises(DataError, match="DATA_EMPTY"):
        split_held_out(examples, 0.1, seed=0, party="north")


def test_a_party_evaluates_on_its_share_its_file_or_its_split(write_jsonl: Write, tmp_path: Path) -> None:
    write_jsonl(*PAIRS)
    write_jsonl(PAIRS[0], name="eval.jsonl")

    def sizes(**source: Any) -> tuple[int, int]:
        data = read_party_data(DataSource(**source), base_dir=tmp_path, settings=DataSettings(), seed=0, party="north")
        return len(data.train), len(data.held_out)

    assert sizes(train="train.jsonl", eval_share=0.4) == (3, 2)
    assert sizes(train="train.jsonl", eval="eval.jsonl") == (5, 1)
    assert sizes(train="train.jsonl", eval_share=0) == (5, 0)
    assert sizes(train=".", eval_split="eval") == (5, 1)
