"""Greedy completions: against one prompt at a time, in any order and batch size, and without side effects."""

# ruff: noqa: S106 - tokens of text, not of access

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedllm.evaluate.generation import generate_completions
from fedllm.seeds import global_torch_stream, stream

VOCAB, EOS = 32, 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": EOS, "<mark>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=["<mark>"]
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=VOCAB,
        max_position_embeddings=64, initializer_range=0.6, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    with global_torch_stream(6, "model"):
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = stream(3, "prompts")
    return [draw.integers(2, VOCAB, size=int(draw.integers(1, 12))).tolist() for _ in range(23)]


def by_hand(model: LlamaForCausalLM, prompt: list[int], new_tokens: int, stops: set[int]) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new_tokens):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token in stops:
                break
            ids.append(token)
    return ids[len(prompt) :]


def test_completions_equal_a_loop_without_cache_or_padding(model, tokenizer, prompts) -> None:
    expected = [by_hand(model, prompt, 12, {EOS}) for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 2, "the sample should stop at different lengths"
    texts = generate_completions(model, tokenizer, prompts, max_new_tokens=12, batch_size=8)
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]


@pytest.mark.parametrize("batch_size", [1, 3, 23, 100])
def test_completions_do_not_depend_on_batch_size_or_order(model, tokenizer, prompts, batch_size) -> None:
    expected = generate_completions(model, tokenizer, prompts, max_new_tokens=12, batch_size=8)
    assert generate_completions(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size) == expected
    backwards = generate_completions(model, tokenizer, prompts[::-1], max_new_tokens=12, batch_size=batch_size)
    assert backwards[::-1] == expected


def test_special_tokens_are_not_in_the_text(model, tokenizer, prompts) -> None:
    texts = generate_completions(model, tokenizer, prompts, max_new_tokens=12, batch_size=8)
    assert not any("<" in text for text in texts)
    assert any(2 in by_hand(model, prompt, 12, {EOS}) for prompt in prompts), "the sample should have a special token"


def test_settings_of_the_model_do_not_sample_or_penalise_and_stay(model, tokenizer, prompts) -> None:
    expected = generate_completions(model, tokenizer, prompts, max_new_tokens=12, batch_size=8)
    config = model.generation_config
    kept = config.to_dict()
    config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, min_new_tokens=7, max_length=4)
    changed = config.to_dict()
    try:
        assert generate_completions(model, tokenizer, prompts, max_new_tokens=12, batch_size=8) == expected
        assert model.generation_config is config
        assert config.to_dict() == changed
    finally:
        config.update(**kept)


def test_stop_tokens_of_the_model_stop_too(model, tokenizer, prompts) -> None:
    whole = by_hand(model, prompts[0], 12, {EOS})
    stop = whole[2]
    model.generation_config.eos_token_id = [EOS, stop]
    try:
        texts = generate_completions(model, tokenizer, prompts[:1], max_new_tokens=12, batch_size=1)
    finally:
        model.generation_config.eos_token_id = EOS
    assert texts == [tokenizer.decode(whole[: whole.index(stop)], skip_special_tokens=True)]


def test_modes_generators_and_use_of_gradients_stay(model, tokenizer, prompts) -> None:
    model.train()
    model.model.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    generate_completions(model, tokenizer, prompts, max_new_tokens=3, batch_size=8)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()
    model.eval()


def test_transformers_warns_of_nothing(model, tokenizer, prompts, recwarn) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        ends_with_padding = [[4, 0], [5, EOS], [6]]
        generate_completions(model, tokenizer, [*prompts, *ends_with_padding], max_new_tokens=4, batch_size=5)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert [record.getMessage() for record in records] == []
    assert [str(warning.message) for warning in recwarn] == []


def test_a_peft_model_completes_as_its_merged_self(model, tokenizer, prompts) -> None:
    with global_torch_stream(5, "adapter"):
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    before = wrapped.base_model.model.generation_config
    texts = generate_completions(wrapped, tokenizer, prompts, max_new_tokens=12, batch_size=8)
    assert wrapped.base_model.model.generation_config is before
    merged = wrapped.merge_adapter() or generate_completions(
        wrapped, tokenizer, prompts, max_new_tokens=12, batch_size=1
    )
    wrapped.unmerge_adapter()
    restored = wrapped.unload()
    assert texts == merged
    assert texts != generate_completions(restored, tokenizer, prompts, max_new_tokens=12, batch_size=8)


def test_a_prompt_longer_than_the_context_is_cut_at_its_beginning(tokenizer) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=VOCAB, initializer_range=0.6)
    with global_torch_stream(6, "model"):
        small = GPT2LMHeadModel(config).eval()
    prompt = [3 + i % 20 for i in range(40)]
    long, short = generate_completions(small, tokenizer, [prompt, prompt[-12:]], max_new_tokens=4, batch_size=2)
    assert long == short


def test_an_empty_prompt_and_no_prompt(model, tokenizer) -> None:
    expected = tokenizer.decode(by_hand(model, [EOS], 5, {EOS}), skip_special_tokens=True)
    assert generate_completions(model, tokenizer, [[], [4, 5]], max_new_tokens=5, batch_size=2)[0] == expected
    assert generate_completions(model, tokenizer, [], max_new_tokens=5, batch_size=2) == []
