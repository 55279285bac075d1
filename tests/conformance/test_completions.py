"""Greedy completions of tuned models: against a loop of forward passes, whatever stands beside a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from combinations import METHODS
from families import ENCODER_DECODERS, save_family
from tiny import make_tokenizer

from fedllm.evaluate.generation import generate_completions
from fedllm.models.adapter import TunableModel
from fedllm.models.load import load_base
from fedllm.models.settings import ModelSettings, PeftSettings
from fedllm.tasks import Task

PROMPTS = [[5, 40, 80, 120], [9, 30], [7, 7, 7, 8, 100, 200], [60, 61]]
NEW_TOKENS = 5


def tuned(folder: Path, method: str, task: Task) -> Any:
    """Return a model whose adapter is far from its start."""
    base = load_base(ModelSettings(model_name_or_path=str(folder)), folder=folder, task=task)
    tunable = TunableModel(base.model, PeftSettings.model_validate(METHODS[method]), task.name)
    generator = torch.Generator().manual_seed(1)
    first = tunable.initial(1)
    tunable.write({name: value + 0.3 * torch.randn(value.shape, generator=generator) for name, value in first.items()})
    return tunable.model.eval()


def by_hand(model: Any, prompt: list[int], stop: int) -> list[int]:
    answer: list[int] = []
    for _ in range(NEW_TOKENS):
        ids = torch.tensor([prompt if model.config.is_encoder_decoder else prompt + answer])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *answer]])
        with torch.no_grad():
            token = int(model(**inputs, use_cache=False).logits[0, -1].argmax())
        if token == stop:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("method", ["LoRA", "prefix", "prompt", "Pfeiffer"])
@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_completions_of_tuned_models_equal_a_loop_without_cache_or_padding(
    family: str, method: str, tmp_path: Path
) -> None:
    task = Task("seq2seq_lm" if family in ENCODER_DECODERS else "causal_lm")
    model, tokenizer = tuned(save_family(family, task.name, tmp_path), method, task), make_tokenizer()
    expected = [by_hand(model, prompt, tokenizer.eos_token_id) for prompt in PROMPTS]
    texts = generate_completions(model, tokenizer, PROMPTS, max_new_tokens=NEW_TOKENS, batch_size=3)
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
