"""Examples of an encoder with a decoder, and of a classifier: tokens, labels, batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import make_tokenizer, write_jsonl
from tokenizers.processors import TemplateProcessing

from fedllm.data.batches import collate
from fedllm.data.formats import Example
from fedllm.data.read import read_examples
from fedllm.data.settings import DataSettings
from fedllm.data.tokens import prompt_ids, tokenise, tokenise_all
from fedllm.errors import DataError

LABELS = ["complaint", "question", "praise"]
PAIRS = DataSettings(task="seq2seq_lm")
CHOICES = DataSettings(task="sequence_classification", labels=LABELS)


@pytest.fixture
def tokenizer() -> Any:
    """A tokenizer that ends every text with its stop token, as those of encoders do."""
    made = make_tokenizer()
    special = [("<eos>", made.eos_token_id)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=special)
    return made


def test_an_encoder_reads_the_prompt_and_a_decoder_is_trained_on_the_completion(tokenizer: Any) -> None:
    example = tokenise(Example(prompt="red dress", completion="silk"), tokenizer, PAIRS)
    given, wanted = tokenizer("red dress")["input_ids"], tokenizer("silk")["input_ids"]
    assert list(example.input_ids) == given + wanted
    assert list(example.loss_mask) == [False] * len(given) + [True] * len(wanted)
    assert (example.apart, example.num_targets, example.target_bytes) == (True, len(wanted), 4)
    assert prompt_ids(Example(prompt="red dress", completion="silk"), tokenizer, PAIRS) == given
    batch = collate([example, example], pad_id=0)
    assert batch["input_ids"].tolist() == [given, given]
    assert batch["labels"].tolist() == [wanted, wanted]


def test_the_stop_token_is_put_where_the_tokenizer_does_not(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    example = tokenise(Example(prompt="red", completion="silk"), tokenizer, PAIRS)
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_each_side_is_cut_at_the_limit(tokenizer: Any) -> None:
    settings = DataSettings(task="seq2seq_lm", max_length=3)
    example = tokenise(Example(prompt="a red dress " * 5, completion="long silk " * 5), tokenizer, settings)
    assert (example.loss_mask, example.truncated) == ((False,) * 3 + (True,) * 3, True)
    assert 0 < example.target_bytes <= len("long silk ")


def test_sides_of_different_lengths_are_padded_apart(tokenizer: Any) -> None:
    rows = [Example(prompt="red", completion="a long warm coat"), Example(prompt="a long warm coat", completion="red")]
    batch = collate([tokenise(row, tokenizer, PAIRS) for row in rows], pad_id=0)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    assert batch["attention_mask"].sum(dim=1).tolist() == (batch["labels"] != -100).sum(dim=1).tolist()[::-1]


def test_plain_text_asks_an_encoder_nothing(tokenizer: Any) -> None:
    with pytest.raises(DataError) as caught:
        tokenise(Example(text="red"), tokenizer, PAIRS)
    assert caught.value.code == "DATA_FORMAT_UNKNOWN"


@pytest.mark.parametrize(("label", "number"), [("complaint", 0), ("praise", 2), ("1", 1)])
def test_a_label_is_found_by_its_name_or_its_number(label: str, number: int, tokenizer: Any) -> None:
    example = tokenise(Example(prompt="red", completion=label), tokenizer, CHOICES)
    assert (example.label, example.num_targets) == (number, 1)
    assert list(example.input_ids) == tokenizer("red")["input_ids"]
    assert "red" not in repr(example)
    assert "label=" not in repr(example)


@pytest.mark.parametrize("label", ["Complaint", "3", "-1", "²", ""])
def test_a_label_that_the_job_does_not_name_is_refused_and_not_quoted(label: str, tokenizer: Any) -> None:
    with pytest.raises(DataError) as caught:
        tokenise_all([Example(prompt="red", completion=label)], tokenizer, CHOICES)
    assert (caught.value.code, caught.value.where) == ("DATA_LABEL_UNKNOWN", "example 1")
    assert not label or f"'{label}'" not in str(caught.value)


def test_a_long_text_keeps_its_end_mark(tokenizer: Any) -> None:
    settings = CHOICES.model_copy(update={"max_length": 4})
    example = tokenise(Example(prompt="a red dress " * 5, completion="praise"), tokenizer, settings)
    assert (len(example.input_ids), example.input_ids[-1], example.truncated) == (4, tokenizer.eos_token_id, True)


def test_labels_are_one_number_a_row(tokenizer: Any) -> None:
    rows = [tokenise(Example(prompt="red " * i, completion=LABELS[i]), tokenizer, CHOICES) for i in (1, 2)]
    assert torch.equal(collate(rows, pad_id=0)["labels"], torch.tensor([1, 2]))


def test_texts_with_labels_are_read_for_a_classifier_and_as_text_for_a_language_model(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "torn", "label": "complaint"}, {"text": "nice", "label": 2}])
    labelled = read_examples("a.jsonl", base_dir=tmp_path, settings=CHOICES)
    assert [(one.prompt, one.completion) for one in labelled] == [("torn", "complaint"), ("nice", "2")]
    assert [one.text for one in read_examples("a.jsonl", base_dir=tmp_path)] == ["torn", "nice"]


@pytest.mark.parametrize("label", [None, True, 1.5, ["praise"]])
def test_a_label_of_another_kind_is_a_broken_record(label: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "torn", "label": label}])
    with pytest.raises(DataError) as caught:
        read_examples("a.jsonl", base_dir=tmp_path, settings=CHOICES)
    assert caught.value.code == "DATA_BROKEN_LINE"


def test_other_columns_are_pointed_to(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"sentence": "torn", "category": "complaint"}])
    with pytest.raises(DataError) as caught:
        read_examples("a.jsonl", base_dir=tmp_path, settings=CHOICES)
    assert "columns: {text: sentence, label: category}" in caught.value.fix


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"task": "sequence_classification"}, "labels is missing"),
        ({"labels": LABELS}, "labels is without effect for causal_lm"),
        ({"task": "sequence_classification", "labels": ["a"]}, "at least 2"),
        ({"task": "sequence_classification", "labels": ["a", "a"]}, "the same"),
        ({"task": "sequence_classification", "labels": ["a", " "]}, "empty"),
        ({"task": "seq2seq_lm", "packing": True}, "packing has no effect"),
        ({"task": "seq2seq_lm", "completion_only_loss": False}, "completion_only_loss has no effect"),
        ({"task": "sequence_classification", "labels": LABELS, "chat_template_path": "x"}, "chat_template_path"),
    ],
)
def test_settings_that_do_not_go_with_the_task_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DataSettings.model_validate(values)
    assert words in str(caught.value)
