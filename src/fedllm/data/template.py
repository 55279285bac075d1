"""Chat templates: which one is in effect, its digest, and chats rendered to tokens.

A template is code of its author; transformers renders it in a sandbox, and whatever it raises is an error with a
code here. Texts of such errors are shown only where they are literally in the template: they can quote a chat.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.data.formats import Message
from fedllm.data.settings import DataSettings
from fedllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")


def chat_template(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> str | None:
    """Return the chat template in effect: the job's file, else the tokenizer's own; None where there is none.

    Args:
        tokenizer: The base model's tokenizer.
        settings: The job's `data` section, its path absolute or relative to the working directory.

    Raises:
        ConfigError: `FILE_NOT_FOUND`, `chat_template_path` names no readable UTF-8 file.
    """
    if settings.chat_template_path is not None:
        return _template_file(Path(settings.chat_template_path))
    own: Any = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _template_file(path: Path) -> str:
    try:
        return _read_template(path, path.stat().st_mtime_ns)
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "cannot be read"
        raise ConfigError(
            "FILE_NOT_FOUND",
            f"the template {path} {reason}",
            where="data.chat_template_path",
            fix="name a Jinja file, relative to job.yaml",
        ) from None


@lru_cache(maxsize=4)
def _read_template(path: Path, _mtime_ns: int) -> str:
    return path.read_bytes().decode("utf-8")


def template_digest(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> str:
    """Return the SHA-256, hex, of the chat template in effect; of no bytes where there is none.

    Args:
        tokenizer: The base model's tokenizer.
        settings: The job's `data` section.
    """
    return hashlib.sha256((chat_template(tokenizer, settings) or "").encode()).hexdigest()


def need_template(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> str:
    """Return the chat template in effect.

    Args:
        tokenizer: The base model's tokenizer.
        settings: The job's `data` section.

    Raises:
        DataError: `DATA_NO_TEMPLATE`.
    """
    if template := chat_template(tokenizer, settings):
        return template
    raise DataError(
        "DATA_NO_TEMPLATE",
        "the examples are chats, and neither the job nor the tokenizer has a chat template",
        fix="set `data.chat_template_path` in job.yaml, or use `prompt` and `completion`",
    )


def marks_generation(template: str) -> bool:
    """Return whether a template marks the assistant's words with `{% generation %}`.

    Args:
        template: The template's text.
    """
    return _GENERATION_TAG.search(template) is not None


def render_ids(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], *, ask: bool = False
) -> list[int]:
    """Return the tokens of a chat.

    Args:
        tokenizer: The base model's tokenizer.
        template: The template in effect.
        messages: The turns.
        ask: Whether the header of a coming assistant turn follows.

    Raises:
        DataError: `DATA_TEMPLATE`.
    """
    encoded = _rendered(
        template,
        lambda: tokenizer.apply_chat_template(
            _as_dicts(messages),
            chat_template=template,
            add_generation_prompt=ask,
            tokenizer_kwargs={"verbose": False},
        ),
    )
    return list(encoded["input_ids"])


def render_marked(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a chat, and which of them the template marks as the assistant's.

    Args:
        tokenizer: The base model's tokenizer; a fast one.
        template: A template for which `marks_generation` holds.
        messages: The turns.

    Raises:
        DataError: `DATA_TEMPLATE`.
    """
    encoded = _rendered(
        template,
        lambda: tokenizer.apply_chat_template(
            _as_dicts(messages),
            chat_template=template,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False, "return_offsets_mapping": True},
        ),
    )
    mask = [bool(mark) for mark in encoded["assistant_masks"]]
    return list(encoded["input_ids"]), _whole_characters(mask, encoded["offset_mapping"])


def _whole_characters(mask: list[bool], offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Return the mask with all tokens of a character marked: transformers marks only the first of a span's last one."""
    for i in range(1, len(mask)):
        mask[i] = mask[i] or (mask[i - 1] and offsets[i][0] < offsets[i - 1][1])
    return mask


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _rendered(template: str, render: Callable[[], Any]) -> Any:
    from jinja2 import TemplateError

    try:
        return render()
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = str(error)
        quoted = f": {said}" if said and said in template else ""
        raise DataError(
            "DATA_TEMPLATE",
            f"the chat template cannot render a chat ({type(error).__name__}{quoted})",
            fix="check the order of roles in the chats, and the template",
        ) from None
