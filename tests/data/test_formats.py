from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.data.formats import BadRecord, ColumnMap, Example, Message, closest_layout, content_digest, show_columns

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def example_of(record: dict[str, Any], columns: ColumnMap | None = None) -> Example:
    columns = columns or ColumnMap()
    (layout,) = columns.matching(record)
    return columns.example(layout, record)


def chat(*turns: tuple[str, str]) -> Example:
    return Example(messages=tuple(Message(role, content) for role, content in turns))


def test_messages_become_a_chat() -> None:
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "答"}]}
    assert example_of(record) == chat(("user", "q"), ("assistant", "答"))


def test_turns_after_the_last_answer_are_left_out() -> None:
    turns = [{"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("user", "thanks"))]
    assert example_of({"messages": turns}) == chat(("user", "q"), ("assistant", "a"))


def test_conversational_prompt_and_completion_are_the_same_as_messages() -> None:
    prompt, answer = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    assert example_of({"prompt": prompt, "completion": answer}) == example_of({"messages": prompt + answer})


def test_sharegpt_is_the_same_as_messages() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert example_of({"conversations": turns}) == chat(("user", "q"), ("assistant", "a"))
    assert example_of({"conversations": turns, "system": "s"}) == chat(
        ("system", "s"), ("user", "q"), ("assistant", "a")
    )


@given(TEXT, TEXT)
def test_prompt_and_completion_are_kept_as_they_are(prompt: str, completion: str) -> None:
    example = example_of({"prompt": prompt, "completion": completion})
    assert (example.prompt, example.completion) == (prompt, completion)


@given(TEXT)
def test_plain_text_is_kept_as_it_is(text: str) -> None:
    assert example_of({"text": text}) == Example(text=text)


def test_instruction_is_joined_by_the_documented_template() -> None:
    with_input = example_of({"instruction": "Translate.", "input": "hello", "output": "你好"})
    assert with_input.prompt == "### Instruction:\nTranslate.\n\n### Input:\nhello\n\n### Response:\n"
    for record in ({"instruction": "Sing.", "output": "La"}, {"instruction": "Sing.", "input": " ", "output": "La"}):
        assert example_of(record) == Example(prompt="### Instruction:\nSing.\n\n### Response:\n", completion="La")


def test_columns_with_other_names_are_mapped() -> None:
    columns = ColumnMap(columns={"prompt": "question", "completion": "answer"})
    assert example_of({"question": "q", "answer": "a"}, columns) == Example(prompt="q", completion="a")


def test_the_text_column_has_the_name_that_the_job_gives() -> None:
    assert example_of({"body": "t"}, ColumnMap(text_field="body")) == Example(text="t")


def test_null_columns_count_as_absent() -> None:
    record = {"messages": None, "prompt": "q", "completion": "a", "text": None}
    assert ColumnMap().matching(record) == ("prompt_completion",)


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"prompt": "q", "completion": ""}, "`completion` is empty"),
        ({"prompt": " \n", "completion": "a"}, "`prompt` is empty"),
        ({"prompt": "q", "completion": None}, "`completion` is null"),
        ({"prompt": "q", "completion": 7}, "`completion` is not text"),
        ({"prompt": [USER], "completion": "a"}, "`prompt` is not text"),
        ({"prompt": [], "completion": [ANSWER]}, "`prompt` is empty"),
        ({"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}, "not one single assistant message"),
        ({"prompt": "q", "completion": "\ud800"}, "half a character"),
        ({"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}, "has `tools`"),
        ({"text": []}, "`text` is not text"),
        ({"messages": "q"}, "not a list of messages"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [ANSWER, USER, ANSWER]}, "begins with an assistant turn"),
        ({"messages": [USER, {"role": "asistant", "content": "a"}]}, "`messages[1].role` is none of"),
        ({"messages": [USER, {"content": "a"}]}, "`messages[1]` is not a message"),
        ({"messages": [USER, ["assistant", "a"]]}, "`messages[1]` is not a message"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, "`messages[1]` has `tool_calls`"),
        ({"messages": [USER, ANSWER | {"content": [{"type": "text"}]}]}, "`messages[1].content` is not text"),
        ({"messages": [USER, ANSWER], "system": "s"}, "has `system`"),
        ({"conversations": [{"from": "human"}]}, "`conversations[0]` is not a turn"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "`conversations[0].from` is none of"),
        ({"conversations": {"from": "human"}}, "not a list of messages"),
        ({"instruction": "i", "input": 3, "output": "o"}, "`input` is not text"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(record: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRecord, match=re.escape(why)):
        example_of(record)


def test_extra_null_keys_of_a_message_are_no_fault() -> None:
    # Arrow gives every message of a file the same keys.
    record = {"messages": [USER | {"tool_calls": None}, ANSWER | {"tool_calls": None}]}
    assert example_of(record) == chat(("user", "q"), ("assistant", "a"))


def test_an_example_has_exactly_one_form() -> None:
    for wrong in ({}, {"prompt": "q"}, {"prompt": "q", "completion": "a", "text": "t"}):
        with pytest.raises(ValueError, match="an example is"):
            Example(**wrong)


def test_repr_of_an_example_shows_no_content() -> None:
    secret = chat(("user", "SECRET"), ("assistant", "SECRET"))
    assert "SECRET" not in repr([secret, secret.messages[0], Example(prompt="SECRET", completion="SECRET")])


def test_content_digest_depends_on_content_and_order() -> None:
    a, b = Example(text="a"), Example(text="b")
    assert len({content_digest([a, b]), content_digest([b, a]), content_digest([a]), content_digest([])}) == 4


@pytest.mark.parametrize(
    ("columns", "layout", "mapping"),
    [
        (["Question", "Answer", "id"], "prompt_completion", {"prompt": "Question", "completion": "Answer"}),
        (["dialogue"], "messages", {"messages": "dialogue"}),
        (["promt", "completion"], "prompt_completion", {"prompt": "promt"}),
        (["document"], "text", {"text": "document"}),
        (["instruction", "response", "context"], "instruction", {}),
    ],
)
def test_the_nearest_layout_is_found(columns: list[str], layout: str, mapping: dict[str, str]) -> None:
    found, hint = closest_layout(columns)
    assert found == layout or layout == "instruction"
    assert mapping.items() <= hint.items()


def test_a_column_name_that_looks_like_content_is_not_shown() -> None:
    shown = show_columns(["prompt", "My account number is 12345, please help me", "x" * 60])
    assert shown == "`prompt`, <column 2>, <column 3>"
