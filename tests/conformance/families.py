"""Tiny random models of every family, with a tokenizer, as folders that `from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import make_tokenizer

from fedllm.tasks import AUTO_CLASSES, TaskName

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_GROUPED = _SIZES | {"num_key_value_heads": 1}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
}
_DISTILBERT = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}

# model_type -> sizes beyond the usual ones; None: other names for all of them.
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    "glm": _GROUPED | {"head_dim": 8},
    "glm4": _GROUPED | {"head_dim": 8},
    "mistral": _GROUPED,
    "gemma": _GROUPED | {"head_dim": 8},
    "gemma2": _GROUPED | {"head_dim": 8},
    "gemma3_text": _GROUPED | {"head_dim": 8},
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    | {"max_position_embeddings": 64},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "gpt_neox": _SIZES,
    "mixtral": _GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1},
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {"t5": _T5, "bart": _BART}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _SIZES,
    "roberta": _SIZES,
    "distilbert": _DISTILBERT,
    "deberta-v2": _SIZES | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    "albert": _SIZES | {"embedding_size": 12},
}
FAMILIES = DECODERS | ENCODER_DECODERS | ENCODERS
TASKS: dict[TaskName, tuple[str, ...]] = {
    "causal_lm": tuple(DECODERS),
    "seq2seq_lm": tuple(ENCODER_DECODERS),
    "sequence_classification": tuple(FAMILIES),
}


def config_of(family: str) -> Any:
    """Return the config of a tiny model.

    Args:
        family: A key of `FAMILIES`.
    """
    from transformers import AutoConfig

    tokenizer = make_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    start = {"decoder_start_token_id": tokenizer.pad_token_id} if family in ENCODER_DECODERS else {}
    return AutoConfig.for_model(family, vocab_size=len(tokenizer), **special, **start, **FAMILIES[family])


def save_family(family: str, task: TaskName, folder: Path) -> Path:
    """Write a random model of a family with its tokenizer into a folder and return it.

    A classifier is saved without its head, as it comes from pre-training.

    Args:
        family: A key of `FAMILIES`.
        task: What it is for.
        folder: Where it goes.
    """
    import transformers
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModel

    tokenizer = make_tokenizer()
    # BART's classifier looks for the stop token.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    config = config_of(family)
    headless = task == "sequence_classification" and family in ENCODERS | DECODERS
    if family in ENCODER_DECODERS:
        task = "seq2seq_lm"
    auto = AutoModel if headless else getattr(transformers, AUTO_CLASSES[task])
    model = auto.from_config(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
