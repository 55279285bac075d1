"""Keep back what transformers prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep back transformers' progress bars, for as long as the context lasts."""
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def no_look_for_padding(model: Any) -> Iterator[None]:
    """Keep a model from looking whether a text without an attention mask is padded, for as long as the context lasts.

    GPT-2 looks, to warn, and under `torch.func.vmap` that is an error.

    Args:
        model: Of transformers, with or without an adapter.
    """
    found = [module.config for module in model.modules() if getattr(module, "config", None) is not None]
    configs = {id(config): config for config in found if getattr(config, "pad_token_id", None) is not None}
    pads = {key: config.pad_token_id for key, config in configs.items()}
    for config in configs.values():
        config.pad_token_id = None
    try:
        yield
    finally:
        for key, config in configs.items():
            config.pad_token_id = pads[key]
