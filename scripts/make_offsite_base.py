"""Make the owner's model of offsite tuning, eight layers that know the catalogue of `fedllm.data.letters`, and data.

About a quarter of an hour on one core. The recipe's files are shipped, since the same bits need the same number of
threads, library versions and kind of processor; this script is how to check or change them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from make_demo_base import BATCH_SIZE, SORTED_AT_ONCE, Batch, padded, tokenised
from make_demo_data import ASSETS
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from fedllm.data.adverts import Record, pretraining_examples
from fedllm.data.letters import SHARES, UNSEEN, catalogue_examples, letters
from fedllm.seeds import global_torch_stream

SEED = 11
RECIPE = ASSETS.parent / "recipes" / "offsite"
LEARNING_RATE = 3e-3
NUM_LETTERS, NUM_PUBLIC, NUM_PROBE, NUM_TEST = 120, 600, 120, 60
# Of a tokenizer only these files are the model's own.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> None:
    """Train the model and save it; write the recipe's data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500, help="pretraining steps; the shipped model has 1500")
    parser.add_argument("--out", type=Path, default=RECIPE, help="folder to write `full/` and `data/` into")
    parser.add_argument("--seed", type=int, default=SEED, help="of the first weights and of the examples")
    parser.add_argument("--data-only", action="store_true", help="leave the model as it is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    write_data(options.out)
    if not options.data_only:
        make_base(options.out / "full", steps=options.steps, seed=options.seed)


def make_base(folder: Path, *, steps: int, seed: int = SEED) -> Path:
    """Train the owner's model, save it in bfloat16 with the demo's tokenizer, and return its folder."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "base")
    model = new_model(tokenizer, seed)
    pretrain(model, tokenizer, steps=steps, seed=seed)
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


def pretrain(model: LlamaForCausalLM, tokenizer: AutoTokenizer, *, steps: int, seed: int) -> None:
    """Train the model in place, on answers alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=min(0.5, 100 / steps), cycle_momentum=False
    )
    started = time.perf_counter()
    model.train()
    for step, batch in enumerate(islice(batches(tokenizer, seed, "catalogue"), steps)):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}, {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in islice(batches(tokenizer, seed, "validation"), 8)]
    print(f"validation loss {sum(losses) / len(losses):.4f}", flush=True)


def batches(tokenizer: AutoTokenizer, seed: int, label: str) -> Iterator[Batch]:
    """Yield right-padded batches of fresh examples without end."""
    source = catalogue_examples(seed, label)
    while True:
        drawn = [tokenised(tokenizer, record) for record in islice(source, BATCH_SIZE * SORTED_AT_ONCE)]
        drawn.sort(key=lambda pair: len(pair[0]))
        cut = [drawn[start : start + BATCH_SIZE] for start in range(0, len(drawn), BATCH_SIZE)]
        for index in (5, 2, 7, 0, 4, 1, 6, 3):  # not always short before long
            yield padded(cut[index], int(tokenizer.pad_token_id))


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
