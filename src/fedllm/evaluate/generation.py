"""Greedy completions of prompts, the same whatever their order and the batch size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedllm.evaluate.loss import evaluating
from fedllm.models.methods import quiet_peft

_NO_LIMIT = 1 << 30


def generate_completions(
    model: Any,
    tokenizer: Any,
    prompts_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Return the greedy completion of each prompt, in the prompts' order, without special tokens.

    The model's mode and `generation_config` are left as they were. Of that config only the stop tokens
    apply, beside the tokenizer's: its sampling settings, penalties and suppressed tokens do not.

    Args:
        model: A language model of transformers, with or without an encoder, or a PEFT model around one.
        tokenizer: Its tokenizer.
        prompts_ids: Token ids of each prompt. One that leaves no room for `max_new_tokens` in the
            model's context is cut at its beginning; an empty one is a start token alone.
        max_new_tokens: Length at which a completion ends, if no stop token came before.
        batch_size: Prompts decoded at once. In fp32 the texts do not depend on it.
    """
    stops = _stop_tokens(model, tokenizer)
    context = getattr(model.config, "max_position_embeddings", None) or _NO_LIMIT
    new_tokens = min(max_new_tokens, context - 1)
    order = sorted(range(len(prompts_ids)), key=lambda index: len(prompts_ids[index]))
    completions = [""] * len(order)
    with evaluating(model), _plain_generation_config(model):
        lengths = [len(prompts_ids[index]) for index in order] if _has_virtual_tokens(model) else [0] * len(order)
        for chosen in _slices(order, lengths, batch_size):
            prompts = [list(prompts_ids[i])[new_tokens - context :] or [_start(tokenizer)] for i in chosen]
            for index, ids in zip(chosen, _generate(model, prompts, stops, new_tokens), strict=True):
                completions[index] = _text(tokenizer, ids, stops)
    return completions


def _generate(model: Any, prompts: list[list[int]], stops: list[int], new_tokens: int) -> list[list[int]]:
    """Return the new token ids of each prompt, with whatever follows the stop token."""
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    # Padding is masked, so any id will do; one that ends no prompt is not taken for right padding.
    pad = next(token for token in itertools.count() if all(prompt[-1] != token for prompt in prompts))
    device = next(model.parameters()).device
    # An encoder counts places from the left; a decoder goes on at the right.
    right = model.config.is_encoder_decoder
    rows = [_padded(prompt, [pad] * (width - len(prompt)), right=right) for prompt in prompts]
    mask = [_padded([1] * len(prompt), [0] * (width - len(prompt)), right=right) for prompt in prompts]
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=stops or None,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    with quiet_peft():
        generated = model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
        )
    # An encoder's input is not repeated; its decoder begins with one start token.
    start = 1 if right else width
    return [list(row) for row in generated[:, start:].tolist()]


def _padded(row: list[int], padding: list[int], *, right: bool) -> list[int]:
    return row + padding if right else padding + row


@contextmanager
def _plain_generation_config(model: nn.Module) -> Iterator[None]:
    """Put aside the generation configs that the model holds: `generate` fills what we leave open from them."""
    from transformers import GenerationConfig

    held = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    try:
        for module, _ in held:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, config in held:
            module.generation_config = config


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    return sorted(stops)


def _start(tokenizer: Any) -> int:
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in known if token is not None))


def _text(tokenizer: Any, ids: list[int], stops: list[int]) -> str:
    kept = list(itertools.takewhile(lambda token: token not in stops, ids))
    return str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _has_virtual_tokens(model: Any) -> bool:
    """Return whether PEFT puts virtual tokens before a row: padding would stand between them and the prompt."""
    config = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def _slices(order: list[int], lengths: list[int], size: int) -> Iterator[list[int]]:
    """Yield the order in slices, in each of which all lengths are the same."""
    for _, same in itertools.groupby(zip(lengths, order, strict=True), key=lambda pair: pair[0]):
        found = [index for _, index in same]
        for start in range(0, len(found), size):
            yield found[start : start + size]
