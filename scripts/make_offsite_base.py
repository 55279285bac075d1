"""Make the owner's model of offsite tuning, eight layers that know the catalogue of `fedllm.data.letters`, and data.

All layers learn the general skill. Then the four in the middle alone learn the catalogue: what an owner wants to keep
is to be where the package does not give it away.

About ten minutes on one core. The recipe's files are shipped, since the same bits need the same number of
threads, library versions and kind of processor; this script is how to check or change them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from itertools import islice
from pathlib import Path

import torch
from make_demo_base import batches, train, validate
from make_demo_data import ASSETS
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from fedllm.data.adverts import Record, pretraining_examples
from fedllm.data.letters import SHARES, UNSEEN, catalogue_examples, letters
from fedllm.seeds import global_torch_stream

SEED = 11
RECIPE = ASSETS.parent / "recipes" / "offsite"
SPEED = {"learning_rate": 3e-3, "warmup_steps": 100}
GENERAL_STEPS, CATALOGUE_STEPS = 600, 1200
# Blocks that the general skill alone is in, at either end: what a package gives away.
OUTER = 2
NUM_LETTERS, NUM_PUBLIC, NUM_PROBE, NUM_TEST = 120, 600, 120, 60
# Of a tokenizer only these files are the model's own.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> None:
    """Train the model and save it; write the recipe's data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RECIPE, help="folder to write `full/` and `data/` into")
    parser.add_argument("--seed", type=int, default=SEED, help="of the first weights and of the examples")
    parser.add_argument("--data-only", action="store_true", help="leave the model as it is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    write_data(options.out)
    if not options.data_only:
        make_base(options.out / "full", seed=options.seed)


def make_base(folder: Path, *, seed: int = SEED, outer: int = OUTER) -> Path:
    """Train the owner's model, save it in bfloat16 with the demo's tokenizer, and return its folder.

    Args:
        folder: Where it goes.
        seed: Of the first weights and of the examples.
        outer: Blocks at either end that do not learn the catalogue.
    """
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "base")
    model = new_model(tokenizer, seed)
    general = pretraining_examples(seed, "letters catalogue")
    train(model, batches(tokenizer, general), steps=GENERAL_STEPS, **SPEED)
    if outer:
        model.requires_grad_(False)
        model.model.layers[outer:-outer].requires_grad_(True)
    train(model, batches(tokenizer, catalogue_examples(seed)), steps=CATALOGUE_STEPS, **SPEED)
    validate(model, batches(tokenizer, catalogue_examples(seed, "validation")))
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(ASSETS / "base" / name, folder / name)
    return folder


def new_model(tokenizer: AutoTokenizer, seed: int) -> LlamaForCausalLM:
    """Return the untrained model: eight layers, about a million parameters."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        **special,
    )
    with global_torch_stream(seed, "offsite base", "init"):
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(max_new_tokens=96, **special)
    return model


def write_data(folder: Path) -> None:
    """Write each party's letters, the owner's probe set and public text, and the common test set."""
    files = {
        f"data/{party}/train.jsonl": letters(SEED, party, products=SHARES[party], count=NUM_LETTERS) for party in SHARES
    }
    seen = [product for products in SHARES.values() for product in products]
    files["data/probe/train.jsonl"] = letters(SEED, "probe", products=seen, count=NUM_PROBE)
    files["data/probe/eval.jsonl"] = letters(SEED, "probe, held out", products=UNSEEN, count=NUM_TEST)
    files["data/test.jsonl"] = letters(SEED, "test", products=UNSEEN, count=NUM_TEST)
    files["data/public.jsonl"] = list(islice(pretraining_examples(SEED, "public"), NUM_PUBLIC))
    for name, records in files.items():
        write_records(folder / name, records)


def write_records(path: Path, records: list[Record]) -> None:
    """Write records as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
