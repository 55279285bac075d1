"""Examples -> tokens with an exact mask of what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fedllm.data.formats import Example, Message
from fedllm.data.settings import DataSettings
from fedllm.data.template import marks_generation, need_template, render_ids, render_marked
from fedllm.errors import DataError, ModelError
from fedllm.tasks import CAUSAL_LM, CLASSIFICATION, SEQ2SEQ_LM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenisedExample:
    """One example as tokens. The repr shows no content.

    Args:
        input_ids: Token ids.
        loss_mask: Whether each token is a target. The first never is: nothing comes before it.
        truncated: Whether tokens were cut off at `max_length`.
        target_bytes: UTF-8 bytes of the text that the targets spell, for perplexity per byte.
        apart: Whether the targets are a decoder's, and the other tokens an encoder's.
        label: Number of the label, the one target of a classifier; no token is one then.
        group: Whose example it is, where training hides persons.
    """

    input_ids: tuple[int, ...] = field(repr=False)
    loss_mask: tuple[bool, ...] = field(repr=False)
    truncated: bool
    target_bytes: int
    apart: bool = False
    label: int | None = field(default=None, repr=False)
    group: str | None = field(default=None, repr=False)

    @property
    def num_targets(self) -> int:
        """How many tokens are trained; a label counts as one."""
        return sum(self.loss_mask) if self.label is None else 1


@dataclass(frozen=True)
class TokenReport:
    """Counts over a tokenised data set; from `tokens` on they are of the examples kept. `groups` are persons."""

    examples: int
    kept: int
    truncated: int
    dropped: int
    tokens: int
    target_tokens: int
    target_bytes: int
    groups: int = 0


@dataclass
class _Draft:
    """Tokens of an example before it is cut; `target_text` is the source text of the targets."""

    ids: list[int]
    mask: list[bool]
    target_text: str


def tokenise(
    example: Example, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, cut: bool = True
) -> TokenisedExample:
    """Return an example as tokens with the mask of its targets.

    Prompt and completion are encoded apart and joined, so that the prompt's tokens are exactly those that
    generation starts from. Every example ends in the tokenizer's stop token, a target.

    Args:
        example: The example.
        tokenizer: The base model's tokenizer.
        settings: The job's `data` section.
        cut: Whether to keep only the first `max_length` tokens.

    Raises:
        DataError: `DATA_NO_TEMPLATE`, `DATA_TEMPLATE` or `DATA_LABEL_UNKNOWN`.
        ModelError: `MODEL_NOT_FOUND`, the tokenizer has no stop token.
    """
    if settings.task != CAUSAL_LM:
        limit = settings.max_length if cut else None
        label = settings.task == CLASSIFICATION
        return _labelled(example, tokenizer, settings, limit) if label else _pair(example, tokenizer, settings, limit)
    draft = _draft(example, tokenizer, settings)
    whole = not draft.mask[0]
    draft.mask[0] = False
    truncated = cut and len(draft.ids) > settings.max_length
    if truncated:
        draft.ids, draft.mask = draft.ids[: settings.max_length], draft.mask[: settings.max_length]
    target_bytes = len(draft.target_text.encode())
    if truncated or not whole:
        target_bytes = min(target_bytes, _decoded_bytes(draft, tokenizer))
    return TokenisedExample(tuple(draft.ids), tuple(draft.mask), truncated, target_bytes)


def tokenise_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> tuple[list[TokenisedExample], TokenReport]:
    """Return the examples that have a target within `max_length`, and counts of all.

    Args:
        examples: Any number of examples.
        tokenizer: The base model's tokenizer.
        settings: The job's `data` section.

    Raises:
        DataError: `DATA_NO_TARGET` when there are examples and none has a target; else as `tokenise`, with the
            number of the example.
    """
    found = [_tokenise_numbered(i, example, tokenizer, settings) for i, example in enumerate(examples, start=1)]
    kept = [example for example in found if example.num_targets]
    if found and not kept:
        raise no_target(len(found), settings.max_length)
    return kept, TokenReport(
        examples=len(found),
        kept=len(kept),
        truncated=sum(example.truncated for example in found),
        dropped=len(found) - len(kept),
        tokens=sum(len(example.input_ids) for example in kept),
        target_tokens=sum(example.num_targets for example in kept),
        target_bytes=sum(example.target_bytes for example in kept),
        groups=len({example.group for example in kept} - {None}),
    )


def no_target(num_examples: int, max_length: int) -> DataError:
    """Return the error for a data set of which no token would be trained.

    Args:
        num_examples: Examples in it.
        max_length: Where they were cut.
    """
    return DataError(
        "DATA_NO_TARGET",
        f"not one of {num_examples} examples has a token to train within max_length = {max_length}",
        fix="raise `data.max_length`, or shorten what comes before the answers",
    )


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> list[int]:
    """Return the tokens that generation starts from.

    They are an exact prefix of the example's tokens, except under a template that marks its answers
    (`assistant_only_loss`), where nothing promises it.

    Args:
        example: A chat, or a prompt with its completion.
        tokenizer: The base model's tokenizer.
        settings: The job's `data` section.

    Raises:
        DataError: As `tokenise`; `DATA_FORMAT_UNKNOWN` for plain text, which asks nothing.
    """
    if example.messages:
        template = need_template(tokenizer, settings)
        return render_ids(tokenizer, template, example.messages[:-1], ask=True)
    if example.prompt is None:
        raise _nothing_asked()
    if settings.task == SEQ2SEQ_LM:
        return _encode(example.prompt, tokenizer, special=True)[: settings.max_length]
    return _opening_ids(example.prompt, tokenizer)


def reference_text(example: Example) -> str:
    """Return the text that a generated answer is compared with: the completion, or the last assistant turn.

    Args:
        example: A chat, or a prompt with its completion.

    Raises:
        DataError: `DATA_FORMAT_UNKNOWN` for plain text.
    """
    if example.messages:
        return example.messages[-1].content
    if example.completion is None:
        raise _nothing_asked()
    return example.completion


def stop_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the tokenizer's stop token.

    Args:
        tokenizer: The base model's tokenizer.

    Raises:
        ModelError: `MODEL_NOT_FOUND`, there is none.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "MODEL_NOT_FOUND",
            "the tokenizer has no stop token (eos_token): a tuned model would never end an answer",
            fix="set eos_token in tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def _nothing_asked() -> DataError:
    return DataError(
        "DATA_FORMAT_UNKNOWN",
        "plain text has no prompt to answer",
        fix="evaluate it by loss only, or use `prompt` and `completion`",
    )


def _tokenise_numbered(
    number: int, example: Example, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> TokenisedExample:
    try:
        found = tokenise(example, tokenizer, settings)
        return replace(found, group=example.group) if example.group else found
    except DataError as error:
        where = error.where or f"example {number}"
        raise DataError(error.code, error.what, where=where, fix=error.fix) from None


def _draft(example: Example, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> _Draft:
    stop = stop_id(tokenizer)
    if example.messages:
        return _with_stop(_chat_draft(example.messages, tokenizer, settings), tokenizer)
    if example.text is not None:
        ids = [*_opening_ids(example.text, tokenizer), stop]
        return _Draft(ids, [True] * len(ids), example.text)
    prompt, completion = example.prompt or "", example.completion or ""
    given = _opening_ids(prompt, tokenizer)
    answer = [*_encode(completion, tokenizer, special=False), stop]
    if settings.completion_only_loss or settings.assistant_only_loss:
        return _Draft(given + answer, [False] * len(given) + [True] * len(answer), completion)
    return _Draft(given + answer, [True] * (len(given) + len(answer)), prompt + completion)


def _pair(
    example: Example, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, limit: int | None
) -> TokenisedExample:
    """Return what an encoder reads and what its decoder answers, each cut at the limit."""
    given = prompt_ids(example, tokenizer, settings)
    answer = reference_text(example)
    wanted = _encode(answer, tokenizer, special=True)
    if wanted[-1:] != [stop_id(tokenizer)]:
        wanted.append(stop_id(tokenizer))
    left, right = (given or [stop_id(tokenizer)])[:limit], wanted[:limit]
    mask = (False,) * len(left) + (True,) * len(right)
    truncated = len(left) + len(right) < len(given) + len(wanted)
    draft = _Draft([*left, *right], list(mask), answer)
    target_bytes = _decoded_bytes(draft, tokenizer) if truncated else len(answer.encode())
    return TokenisedExample((*left, *right), mask, truncated, target_bytes, apart=True)


def _labelled(
    example: Example, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, limit: int | None
) -> TokenisedExample:
    """Return a text with the number of its label."""
    names, label = settings.label_names, example.completion or ""
    if label not in names and not (label.isdecimal() and int(label) < len(names)):
        raise DataError(
            "DATA_LABEL_UNKNOWN",
            f"its label is none of the job's {len(names)} ({', '.join(names[:5])}), nor the number of one",
            fix="correct it, or name it in `data.labels` of the job",
        )
    whole = _encode(example.prompt or "", tokenizer, special=True) or [stop_id(tokenizer)]
    # Cut by the tokenizer, which keeps the separator at the end.
    ids = whole if limit is None or len(whole) <= limit else _encode(example.prompt or "", tokenizer, limit=limit)
    number = names.index(label) if label in names else int(label)
    return TokenisedExample(tuple(ids), (False,) * len(ids), len(ids) < len(whole), 0, label=number)


def _opening_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text at the start of a sequence, without the stop that some tokenizers add."""
    ids = _encode(text, tokenizer, special=True)
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _encode(
    text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool = True, limit: int | None = None
) -> list[int]:
    encoded = tokenizer(
        text,
        add_special_tokens=special,
        truncation=limit is not None,
        max_length=limit,
        return_attention_mask=False,
        verbose=False,
    )
    return list(encoded["input_ids"])


def _chat_draft(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> _Draft:
    template = need_template(tokenizer, settings)
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if settings.assistant_only_loss:
        text = "".join(messages[i].content for i in answers)
        if marks_generation(template):
            return _Draft(*render_marked(tokenizer, template, messages), text)
    elif settings.completion_only_loss:
        answers = answers[-1:]
        text = messages[-1].content
    else:
        ids = render_ids(tokenizer, template, messages)
        return _Draft(ids, [True] * len(ids), "".join(message.content for message in messages))
    ids = render_ids(tokenizer, template, messages)
    mask = [False] * len(ids)
    for turn in answers:
        start = _prefix_length(ids, render_ids(tokenizer, template, messages[:turn], ask=True))
        until = messages[: turn + 1]
        end = len(ids) if until == messages else _prefix_length(ids, render_ids(tokenizer, template, until))
        mask[start:end] = [True] * (end - start)
    return _Draft(ids, mask, text)


def _prefix_length(ids: list[int], prefix: list[int]) -> int:
    if ids[: len(prefix)] == prefix:
        return len(prefix)
    raise DataError(
        "DATA_TEMPLATE",
        "the beginning of a chat gives other tokens alone than within the chat, so answers cannot be told apart",
        fix="let the header of an assistant turn end in a special token or a line break; "
        "or mark the answers with {% generation %} and set `assistant_only_loss`",
    )


def _with_stop(draft: _Draft, tokenizer: PreTrainedTokenizerBase) -> _Draft:
    """Let the last target be the stop token: the template's own, or one put after the answer."""
    ids, mask, stop = draft.ids, draft.mask, stop_id(tokenizer)
    targets = [i for i, wanted in enumerate(mask) if wanted]
    if not targets:
        return draft
    last = end = targets[-1]
    while mask[end] and end > 0 and tokenizer.decode([ids[end]]).isspace():
        end -= 1
    if mask[end] and ids[end] == stop:
        mask[end + 1 :] = [False] * (len(ids) - end - 1)
    elif ids[last + 1 : last + 2] == [stop]:
        mask[last + 1] = True
    else:
        draft.ids, draft.mask = [*ids[: last + 1], stop], [*mask[: last + 1], True]
    return draft


def _decoded_bytes(draft: _Draft, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the UTF-8 bytes of the targets that are left; half a character at an end does not count."""
    targets = [token for token, wanted in zip(draft.ids, draft.mask, strict=True) if wanted]
    text: str = tokenizer.decode(targets, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.strip("\ufffd").encode())
