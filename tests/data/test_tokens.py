from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from fedllm.data.formats import Example, Message
from fedllm.data.settings import DataSettings
from fedllm.data.template import template_digest
from fedllm.data.tokens import TokenisedExample, prompt_ids, reference_text, tokenise, tokenise_all
from fedllm.errors import ConfigError, DataError, ModelError

Tok = PreTrainedTokenizerFast
SETTINGS = DataSettings()
PAIR = Example(prompt="红色 dress:", completion=" 丝绸 silk")
CHAT = Example(
    messages=(
        Message("system", "be brief"),
        Message("user", "问 one"),
        Message("assistant", "答 one"),
        Message("user", "question two"),
        Message("assistant", "answer 二"),
    )
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def trained(example: TokenisedExample, tokenizer: Tok) -> str:
    """What the targets spell, special tokens included."""
    return tokenizer.decode([t for t, wanted in zip(example.input_ids, example.loss_mask, strict=True) if wanted])


def whole(example: TokenisedExample, tokenizer: Tok) -> str:
    return tokenizer.decode(list(example.input_ids))


def test_the_completion_and_the_stop_token_are_trained_and_nothing_else(tokenizer: Tok) -> None:
    example = tokenise(PAIR, tokenizer, SETTINGS)
    assert trained(example, tokenizer) == " 丝绸 silk<eos>"
    assert whole(example, tokenizer) == "红色 dress: 丝绸 silk<eos>"
    assert example.target_bytes == len(" 丝绸 silk".encode())
    assert not example.truncated


@given(TEXT, TEXT)
def test_the_prompt_is_an_exact_prefix_whatever_the_texts(tokenizer: Tok, prompt: str, completion: str) -> None:
    pair = Example(prompt=prompt, completion=completion)
    example, given_ids = tokenise(pair, tokenizer, SETTINGS), prompt_ids(pair, tokenizer, SETTINGS)
    assert list(example.input_ids[: len(given_ids)]) == given_ids
    assert example.loss_mask == (False,) * len(given_ids) + (True,) * (len(example.input_ids) - len(given_ids))
    assert tokenizer.decode(given_ids) == prompt
    assert example.target_bytes == len(completion.encode())


def test_prompt_and_completion_are_trained_together_if_asked(tokenizer: Tok) -> None:
    pair = Example(prompt="a b:", completion=" 丝绸")
    example = tokenise(pair, tokenizer, DataSettings(completion_only_loss=False))
    assert trained(example, tokenizer) == " b: 丝绸<eos>", "nothing comes before the first token"
    assert example.target_bytes == len(" b: 丝绸".encode())


def test_an_end_token_that_the_tokenizer_adds_itself_does_not_part_prompt_and_completion(bare_tokenizer: Tok) -> None:
    bare_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    example = tokenise(PAIR, bare_tokenizer, SETTINGS)
    assert whole(example, bare_tokenizer) == "<bos>红色 dress: 丝绸 silk<eos>"
    assert prompt_ids(PAIR, bare_tokenizer, SETTINGS)[-1] != bare_tokenizer.eos_token_id
    text = tokenise(Example(text="a b"), bare_tokenizer, SETTINGS)
    assert trained(text, bare_tokenizer) == "a b<eos>"
    assert text.target_bytes == 3


def test_plain_text_is_trained_from_its_second_token_to_the_stop_token(tokenizer: Tok) -> None:
    example = tokenise(Example(text="a b c"), tokenizer, SETTINGS)
    assert whole(example, tokenizer) == "a b c<eos>"
    assert trained(example, tokenizer) == " b c<eos>"
    assert example.target_bytes == len(" b c")


def test_of_a_chat_the_last_answer_is_trained(tokenizer: Tok) -> None:
    example = tokenise(CHAT, tokenizer, SETTINGS)
    assert trained(example, tokenizer) == "answer 二<eos>"
    assert example.target_bytes == len("answer 二".encode())
    given_ids = prompt_ids(CHAT, tokenizer, SETTINGS)
    assert list(example.input_ids[: len(given_ids)]) == given_ids
    assert example.loss_mask.index(True) == len(given_ids)


def test_every_answer_of_a_chat_is_trained_if_asked(tokenizer: Tok, marked_tokenizer: Tok) -> None:
    settings = DataSettings(assistant_only_loss=True)
    by_prefixes = tokenise(CHAT, tokenizer, settings)
    assert trained(by_prefixes, tokenizer) == "答 one<eos>\nanswer 二<eos>"
    by_marks = tokenise(CHAT, marked_tokenizer, settings)
    assert trained(by_marks, marked_tokenizer) == "答 one<eos>answer 二<eos>"
    assert by_prefixes.target_bytes == by_marks.target_bytes == len("答 oneanswer 二".encode())


def test_a_whole_chat_is_trained_if_asked(tokenizer: Tok) -> None:
    example = tokenise(CHAT, tokenizer, DataSettings(completion_only_loss=False))
    assert trained(example, tokenizer).startswith("<|system|>\nbe brief\n<|user|>")
    assert trained(example, tokenizer).endswith("answer 二<eos>")


@pytest.mark.parametrize("settings", [SETTINGS, DataSettings(assistant_only_loss=True)])
@pytest.mark.parametrize(
    "answer",
    [
        "{{ m['content'] }}",
        "{{ m['content'] + '\n' }}",
        "{% generation %}{{ m['content'] }}{% endgeneration %}",
        "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token + '\n' }}",
        "{% generation %}{{ m['content'] + eos_token + '\n' }}{% endgeneration %}",
    ],
)
def test_an_answer_ends_in_one_trained_stop_token_whatever_the_template_writes(
    bare_tokenizer: Tok, answer: str, settings: DataSettings
) -> None:
    given_turn, ask = "{{ m['content'] + '\n' }}", "{{ '<|assistant|>\n' }}"
    bare_tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
        f"{{% if m['role'] == 'assistant' %}}{answer}{{% else %}}{given_turn}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{ask}{{% endif %}}"
    )
    chat = Example(messages=CHAT.messages[-2:])
    example = tokenise(chat, bare_tokenizer, settings)
    assert trained(example, bare_tokenizer) in ("answer 二<eos>", "answer 二\n<eos>")
    assert example.target_bytes == len("answer 二".encode())


def test_all_tokens_of_a_last_character_are_trained_where_the_template_marks_answers(bare_tokenizer: Tok) -> None:
    # transformers marks only the first of the tokens that the last character of a marked span is made of.
    bare_tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ '<|user|>' + m['content'] + '<|assistant|>' }}{% endif %}{% endfor %}"
    )
    example = tokenise(CHAT, bare_tokenizer, DataSettings(assistant_only_loss=True))
    assert trained(example, bare_tokenizer) == "答 oneanswer 二<eos>"


def test_a_header_that_melts_into_the_answer_is_refused(bare_tokenizer: Tok) -> None:
    bare_tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['content'] }}{% endfor %}{% if add_generation_prompt %}[re{% endif %}"
    )
    chat = Example(messages=(Message("user", "the"), Message("assistant", "ress")))
    with pytest.raises(DataError, match="DATA_TEMPLATE"):
        tokenise(chat, bare_tokenizer, SETTINGS)


def test_a_chat_without_a_template_is_refused(bare_tokenizer: Tok) -> None:
    for call in (tokenise, prompt_ids):
        with pytest.raises(DataError, match="DATA_NO_TEMPLATE"):
            call(CHAT, bare_tokenizer, SETTINGS)


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ raise_exception(messages[1]['content']) }}", "TemplateError)"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[99]['content'] }}", "UndefinedError"),
    ],
)
def test_a_template_that_fails_is_an_error_that_quotes_no_chat(bare_tokenizer: Tok, template: str, shown: str) -> None:
    bare_tokenizer.chat_template = template
    with pytest.raises(DataError) as caught:
        tokenise(CHAT, bare_tokenizer, SETTINGS)
    assert caught.value.code == "DATA_TEMPLATE"
    assert shown in caught.value.what
    assert "问" not in str(caught.value)


def test_the_templates_file_of_the_job_goes_before_the_tokenizers_own(tokenizer: Tok, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (tmp_path / "chat.jinja").write_bytes(template.encode())
    settings = DataSettings(chat_template_path="chat.jinja").with_base_dir(tmp_path)
    chat = Example(messages=(Message("user", "q"), Message("assistant", "a")))
    assert whole(tokenise(chat, tokenizer, settings), tokenizer) == "[q][a]<eos>"
    assert template_digest(tokenizer, settings) == hashlib.sha256(template.encode()).hexdigest()
    assert template_digest(tokenizer, settings) != template_digest(tokenizer, SETTINGS)


def test_a_missing_template_file_is_refused(tokenizer: Tok, tmp_path: Path) -> None:
    settings = DataSettings(chat_template_path="chat.jinja").with_base_dir(tmp_path)
    with pytest.raises(ConfigError, match="FILE_NOT_FOUND"):
        template_digest(tokenizer, settings)


def test_no_template_has_the_digest_of_no_bytes(bare_tokenizer: Tok) -> None:
    assert template_digest(bare_tokenizer, SETTINGS) == hashlib.sha256(b"").hexdigest()


def test_a_tokenizer_without_stop_token_is_refused(bare_tokenizer: Tok) -> None:
    bare_tokenizer.eos_token = None
    with pytest.raises(ModelError, match="eos_token"):
        tokenise(PAIR, bare_tokenizer, SETTINGS)


def test_the_left_part_is_kept_and_bytes_are_those_of_the_targets_left(tokenizer: Tok) -> None:
    full = tokenise(PAIR, tokenizer, SETTINGS)
    for length in range(2, len(full.input_ids)):
        cut = tokenise(PAIR, tokenizer, DataSettings(max_length=length))
        assert cut.input_ids == full.input_ids[:length]
        assert cut.loss_mask == full.loss_mask[:length]
        assert cut.truncated
        left = trained(cut, tokenizer).rstrip("\ufffd")
        assert PAIR.completion is not None
        assert PAIR.completion.startswith(left)
        assert cut.target_bytes == len(left.encode())


def test_examples_without_a_target_left_are_dropped_and_counted(tokenizer: Tok) -> None:
    long = Example(prompt="a b c d " * 20, completion="x")
    kept, report = tokenise_all([PAIR, long, PAIR], tokenizer, DataSettings(max_length=40))
    assert [trained(example, tokenizer) for example in kept] == [" 丝绸 silk<eos>"] * 2
    assert (report.examples, report.kept, report.dropped, report.truncated) == (3, 2, 1, 1)
    assert report.tokens == sum(len(example.input_ids) for example in kept)
    assert report.target_tokens == sum(example.num_targets for example in kept)
    assert report.target_bytes == 2 * len(" 丝绸 silk".encode())


def test_nothing_left_to_train_is_refused_and_nothing_at_all_is_not(tokenizer: Tok) -> None:
    with pytest.raises(DataError, match="DATA_NO_TARGET"):
        tokenise_all([PAIR], tokenizer, DataSettings(max_length=2))
    assert tokenise_all([], tokenizer, SETTINGS)[0] == []


def test_the_example_at_fault_is_named_by_its_number(bare_tokenizer: Tok) -> None:
    with pytest.raises(DataError) as caught:
        tokenise_all([PAIR, CHAT], bare_tokenizer, SETTINGS)
    assert caught.value.where == "example 2"


def test_references_are_the_answers(tokenizer: Tok) -> None:
    assert (reference_text(PAIR), reference_text(CHAT)) == (" 丝绸 silk", "answer 二")
    for call in (lambda e: reference_text(e), lambda e: prompt_ids(e, tokenizer, SETTINGS)):
        with pytest.raises(DataError, match="no prompt"):
            call(Example(text="plain"))


def test_repr_shows_no_tokens(tokenizer: Tok) -> None:
    example = tokenise(PAIR, tokenizer, SETTINGS)
    assert str(example.input_ids[0]) not in repr(example).replace(str(example.target_bytes), "")


def test_tokens_of_a_chat_are_the_templates_own(tokenizer: Tok) -> None:
    turns = [{"role": m.role, "content": m.content} for m in CHAT.messages]
    asked: Any = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]
    ids: Any = tokenizer.apply_chat_template(turns)["input_ids"]
    ours = tokenise(CHAT, tokenizer, SETTINGS)
    assert list(ours.input_ids) == ids
    # The line break that the template writes after the stop token is no target: no generation gets there.
    assert ours.loss_mask == (False,) * len(asked) + (True,) * (len(ids) - len(asked) - 1) + (False,)
