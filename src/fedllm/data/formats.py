"""Layouts of training records, and how a record of each becomes an `Example`.

Imports neither torch nor transformers: settings and the command line use it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fedllm.errors import nearest
from fedllm.tasks import CAUSAL_LM, CLASSIFICATION, TaskName

Kind = Literal["chat", "prompt_completion", "text"]

# The layout of a text with its label.
LABELLED = "classification"
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
}
# Keys that change what a record means. Leaving them out in silence would train on something else.
MEANINGFUL_COLUMNS = ("tools", "images", "videos", "audios", "history", "system")
MEANINGFUL_MESSAGE_KEYS = ("tool_calls", "function_call", "tool_call_id", "weight", "train", "reasoning_content")
SYNONYMS = {
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns", "message"),
    "conversations": ("items", "sharegpt"),
    "prompt": ("question", "query", "source", "src", "request", "input", "content", "context"),
    "completion": ("answer", "response", "target", "tgt", "reply", "output", "summary", "label"),
    "instruction": ("task", "command"),
    "label": ("class", "category", "target", "labels"),
    "text": ("body", "document", "passage", "sentence", "content"),
}


class BadRecord(ValueError):
    """One record cannot be used; the text says why and never quotes the record."""


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str = field(repr=False)


@dataclass(frozen=True, repr=False)
class Example:
    """One training example in canonical form: a chat, a prompt with its completion, or plain text.

    `group` names the person that it is of, where that counts. Equal examples are duplicates. The repr shows no content,
    so that a log cannot hold a row.
    """

    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        forms = (bool(self.messages), self.prompt is not None, self.text is not None)
        if forms.count(True) != 1 or (self.prompt is None) != (self.completion is None):
            raise ValueError("an example is a chat, or a prompt with its completion, or a text")

    def __repr__(self) -> str:
        return f"<Example: {self.kind}>"

    @property
    def kind(self) -> Kind:
        """Which of the three forms this example has."""
        if self.messages:
            return "chat"
        return "text" if self.text is not None else "prompt_completion"

    @property
    def question(self) -> tuple[Message, ...] | str | None:
        """What is given: the turns before the last assistant turn, or the prompt; None for plain text."""
        return self.messages[:-1] if self.messages else self.prompt

    def strings(self) -> Iterable[str]:
        """Every text of the example, in order."""
        if self.messages:
            return (message.content for message in self.messages)
        return (part for part in (self.prompt, self.completion, self.text) if part is not None)


@dataclass(frozen=True)
class Layout:
    """A layout of records: the columns it needs, the columns it can use, and the way to an `Example`."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[Mapping[str, Any]], Example]


@dataclass(frozen=True)
class ColumnMap:
    """How the columns of a file are called, and which layouts they may have.

    Args:
        format: `auto`, or the name of a layout.
        columns: Canonical name -> name in the file, for those that differ.
        text_field: Column of plain text, `dataset_text_field` of the job.
        task: What is learnt: classification has a layout of its own.
        group_by: Column that names the person.
    """

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    text_field: str = "text"
    task: TaskName = CAUSAL_LM
    group_by: str | None = None

    def name_of(self, canonical: str) -> str:
        """Return the name that a canonical column has in the file."""
        default = self.text_field if canonical == "text" else canonical
        return self.columns.get(canonical, default)

    def candidates(self) -> tuple[str, ...]:
        """Return the layouts that fit `format` and use every mapped column."""
        known = LAYOUTS if self.format == "auto" else (self.format,)
        names = [name for name in known if (name == LABELLED) == (self.task == CLASSIFICATION)]
        return tuple(name for name in names if set(self.columns) <= set(canonical_columns(name)))

    def matching(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the candidate layouts whose required columns a record has.

        Columns that hold null count only when nothing fits without them: Arrow fills absent ones with null.
        """
        filled = {name for name, value in fields.items() if value is not None}
        return self._fitting(filled) or self._fitting(set(fields))

    def _fitting(self, present: set[str]) -> tuple[str, ...]:
        return tuple(name for name in self.candidates() if not self.absent(name, present))

    def absent(self, layout: str, present: Iterable[str]) -> list[str]:
        """Return the required columns, by their name in the file, that are not among those present."""
        have = set(present)
        return [self.name_of(c) for c in LAYOUTS[layout].required if self.name_of(c) not in have]

    def used(self, layout: str) -> set[str]:
        """Return the names in the file of every column that the layout can use."""
        return {self.name_of(column) for column in canonical_columns(layout)}

    def example(self, layout: str, fields: Mapping[str, Any]) -> Example:
        """Return the example in a record.

        Args:
            layout: A key of `LAYOUTS`.
            fields: The record, under the file's own names.

        Raises:
            BadRecord: A column is missing, empty, of another type, or would be ignored though it has a meaning.
        """
        if missing := self.absent(layout, fields):
            raise BadRecord(f"lacks {_quoted(missing)}")
        used = self.used(layout)
        for column in MEANINGFUL_COLUMNS:
            if column not in used and fields.get(column):
                raise BadRecord(f"has `{column}`, which layout `{layout}` does not use")
        canonical = {name: fields.get(self.name_of(name)) for name in canonical_columns(layout)}
        example = LAYOUTS[layout].build(canonical)
        return replace(example, group=self._group_of(fields)) if self.group_by else example

    def _group_of(self, fields: Mapping[str, Any]) -> str:
        group = fields.get(self.group_by or "")
        if group is None or not str(group).strip():
            raise BadRecord(f"names nobody in `{self.group_by}`")
        return str(group)


def content_digest(examples: Iterable[Example]) -> str:
    """Return the SHA-256, hex, of examples in canonical form and in their order.

    Args:
        examples: Any number of examples.
    """
    digest = hashlib.sha256()
    for example in examples:
        messages = [[message.role, message.content] for message in example.messages]
        fields = [messages, example.prompt, example.completion, example.text]
        digest.update(json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def canonical_columns(layout: str) -> tuple[str, ...]:
    """Return the columns of a layout, the required ones first."""
    return LAYOUTS[layout].required + LAYOUTS[layout].optional


def closest_layout(columns: Iterable[str], task: TaskName = CAUSAL_LM) -> tuple[str, dict[str, str]]:
    """Return the layout nearest to some column names, and the mapping that would make them fit.

    Args:
        columns: Names found in the file.
        task: What is learnt.
    """
    found = list(columns)
    best: tuple[float, str, dict[str, str]] = (-1.0, "messages", {})
    for name in ColumnMap(task=task).candidates():
        layout = LAYOUTS[name]
        guesses = {column: _guess(column, found) for column in layout.required}
        hits = {column: guess for column, guess in guesses.items() if guess}
        score = len(hits) / len(layout.required)
        if score > best[0]:
            best = (score, name, {column: guess for column, guess in hits.items() if guess != column})
    return best[1], best[2]


def show_columns(columns: Iterable[str]) -> str:
    """Return column names for a message, at most 12; a name that looks like content is numbered instead.

    The first line of a CSV file without a header is a row, and rows are not shown.
    """
    names = [
        f"`{name}`" if re.fullmatch(r"[\w.\-]+( [\w.\-]+){0,2}", name) and len(name) <= 40 else f"<column {i}>"
        for i, name in enumerate(columns, start=1)
    ]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more


def _guess(column: str, found: list[str]) -> str | None:
    lowered = {name.lower().strip(): name for name in found}
    for word in (column, *SYNONYMS.get(column, ())):
        if word in lowered:
            return lowered[word]
    close = nearest(column, found) if found else ""
    return close.split("`")[1] if close.startswith("did you mean") else None


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """Return a text that can be trained on, or say what is wrong with it."""
    if not isinstance(value, str):
        raise BadRecord(f"`{name}` is not text" if value is not None else f"`{name}` is null")
    if not may_be_empty and not value.strip():
        raise BadRecord(f"`{name}` is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"`{name}` holds half a character (a lone surrogate)") from None
    return value


def _chat(turns: Any, column: str) -> Example:
    return Example(messages=_up_to_last_answer(_turns(turns, column), column))


def _turns(turns: Any, column: str) -> list[Message]:
    if not isinstance(turns, list | tuple):
        raise BadRecord(f"`{column}` is not a list of messages")
    return [_message(turn, f"{column}[{i}]") for i, turn in enumerate(turns)]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
        raise BadRecord(f"`{where}` is not a message with `role` and `content`")
    _refuse_meaningful_keys(turn, where)
    if turn["role"] not in ROLES:
        raise BadRecord(f"`{where}.role` is none of {', '.join(ROLES)}")
    empty = turn["role"] in ("system", "developer", "tool")
    return Message(turn["role"], _text(turn["content"], f"{where}.content", may_be_empty=empty))


def _refuse_meaningful_keys(turn: Mapping[str, Any], where: str) -> None:
    for key in MEANINGFUL_MESSAGE_KEYS:
        if turn.get(key) is not None:
            raise BadRecord(f"`{where}` has `{key}`, which is not supported")


def _up_to_last_answer(turns: list[Message], column: str) -> tuple[Message, ...]:
    """Return the turns up to the last answer: what follows it has nothing to train."""
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise BadRecord(f"`{column}` has no assistant turn")
    if answers[0] == 0:
        raise BadRecord(f"`{column}` begins with an assistant turn: nothing is asked")
    return tuple(turns[: answers[-1] + 1])


def _from_messages(record: Mapping[str, Any]) -> Example:
    return _chat(record["messages"], "messages")


def _from_prompt_completion(record: Mapping[str, Any]) -> Example:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
        answer = _turns(completion, "completion")
        if len(answer) != 1 or answer[0].role != "assistant":
            raise BadRecord("`completion` is not one single assistant message; use `messages` for more turns")
        turns = _turns(prompt, "prompt")
        if not turns:
            raise BadRecord("`prompt` is empty")
        return _chat_of(turns + answer)
    return Example(prompt=_text(prompt, "prompt"), completion=_text(completion, "completion"))


def _chat_of(turns: list[Message]) -> Example:
    return Example(messages=_up_to_last_answer(turns, "prompt"))


def _from_instruction(record: Mapping[str, Any]) -> Example:
    instruction = _text(record["instruction"], "instruction")
    extra = _text(record["input"], "input", may_be_empty=True) if record["input"] is not None else ""
    parts = [f"### Instruction:\n{instruction}"]
    if extra.strip():
        parts.append(f"### Input:\n{extra}")
    prompt = "\n\n".join([*parts, "### Response:\n"])
    return Example(prompt=prompt, completion=_text(record["output"], "output"))


def _from_sharegpt(record: Mapping[str, Any]) -> Example:
    turns = record["conversations"]
    if not isinstance(turns, list | tuple):
        raise BadRecord("`conversations` is not a list of messages")
    system = [{"role": "system", "content": record["system"]}] if record["system"] else []
    renamed = [_sharegpt_turn(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    return _chat([*system, *renamed], "conversations")


def _sharegpt_turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise BadRecord(f"`{where}` is not a turn with `from` and `value`")
    _refuse_meaningful_keys(turn, where)
    if turn["from"] not in SHAREGPT_ROLES:
        raise BadRecord(f"`{where}.from` is none of {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


def _from_labelled(record: Mapping[str, Any]) -> Example:
    label = record["label"]
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise BadRecord("`label` is neither a label's name nor its number" if label is not None else "`label` is null")
    return Example(prompt=_text(record["text"], "text"), completion=_text(str(label), "label"))


def _from_text(record: Mapping[str, Any]) -> Example:
    return Example(text=_text(record["text"], "text"))


LAYOUTS: dict[str, Layout] = {
    "messages": Layout(("messages",), (), _from_messages),
    "prompt_completion": Layout(("prompt", "completion"), (), _from_prompt_completion),
    "instruction": Layout(("instruction", "output"), ("input",), _from_instruction),
    "sharegpt": Layout(("conversations",), ("system",), _from_sharegpt),
    "text": Layout(("text",), (), _from_text),
    LABELLED: Layout(("text", "label"), (), _from_labelled),
}
COLUMN_NAMES = tuple(dict.fromkeys(column for name in LAYOUTS for column in canonical_columns(name)))
