"""Make the demo's base model and tokenizer: about five minutes on one core, same files every time.

The same bits need the same number of threads (set here), library versions and kind of processor, so the
files are shipped and this script is how to check or change them. It writes `base/` and renews DIGESTS.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from make_demo_data import ASSETS, write_digests
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedllm.data.adverts import PRODUCTS, Record, pretraining_examples
from fedllm.seeds import global_torch_stream

SEED = 11
NUM_THREADS = 1
VOCAB_SIZE = 1024
BATCH_SIZE = 32
LEARNING_RATE = 4e-3
WARMUP_STEPS = 50
SORTED_AT_ONCE = 8  # batches drawn together and cut by length, to pad less
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '\n' }}{% endif %}"
    "{% endfor %}"
)
Batch = dict[str, torch.Tensor]


def main() -> None:
    """Train the tokenizer and the model, save both, print the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="pretraining steps; the shipped model has 1000")
    parser.add_argument("--out", type=Path, default=ASSETS / "base", help="folder to write")
    options = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    tokenizer = trained_tokenizer()
    model = new_model(tokenizer)
    pretrain(model, tokenizer, options.steps)
    tokenizer.save_pretrained(options.out)
    model.save_pretrained(options.out)
    if options.out == ASSETS / "base":
        write_digests()


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that puts the begin token first and reads `messages` too."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    records = list(islice(pretraining_examples(SEED, "tokenizer"), 6000))
    words = [f"#{product} {product}" for product in PRODUCTS]
    bpe.train_from_iterator([part for record in records for part in record.values()] + words * 400, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=256
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model, a small Llama whose weights follow from the seed."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        **special,
    )
    with global_torch_stream(SEED, "base", "init"):
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(max_new_tokens=96, pad_token_id=tokenizer.pad_token_id, **special)
    return model


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Train the model in place, and print its loss on examples of which it has seen none."""
    source = batches(tokenizer, pretraining_examples(SEED, "pretraining"))
    train(model, source, steps=steps, learning_rate=LEARNING_RATE, warmup_steps=WARMUP_STEPS)
    validate(model, batches(tokenizer, pretraining_examples(SEED, "validation")))


def train(
    model: LlamaForCausalLM, source: Iterator[Batch], *, steps: int, learning_rate: float, warmup_steps: int
) -> None:
    """Train what is trainable of the model in place; loss on completions and the end token only, as in tuning.

    Args:
        model: The model.
        source: Batches.
        steps: How many of them.
        learning_rate: At its peak.
        warmup_steps: Steps until then.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=min(0.5, warmup_steps / steps), cycle_momentum=False
    )
    started = time.perf_counter()
    model.train()
    for step, batch in enumerate(islice(source, steps)):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}, {time.perf_counter() - started:.0f} s", flush=True)


def validate(model: LlamaForCausalLM, source: Iterator[Batch]) -> None:
    """Print the model's mean loss over eight batches, and leave it ready for use."""
    model.eval()
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in islice(source, 8)]
    print(f"validation loss {sum(losses) / len(losses):.4f}", flush=True)


def batches(tokenizer: PreTrainedTokenizerFast, source: Iterator[Record]) -> Iterator[Batch]:
    """Yield right-padded batches of examples as long as there are any."""
    while drawn := [tokenised(tokenizer, record) for record in islice(source, BATCH_SIZE * SORTED_AT_ONCE)]:
        drawn.sort(key=lambda pair: len(pair[0]))
        cut = [drawn[start : start + BATCH_SIZE] for start in range(0, len(drawn), BATCH_SIZE)]
        for index in (5, 2, 7, 0, 4, 1, 6, 3):  # not always short before long
            yield padded(cut[index], int(tokenizer.pad_token_id))


def tokenised(tokenizer: PreTrainedTokenizerFast, record: Record) -> tuple[list[int], list[int]]:
    """Return the token ids and the labels, -100 on the prompt."""
    start = tokenizer(record["prompt"])["input_ids"]
    answer = tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
    answer.append(tokenizer.eos_token_id)
    return start + answer, [-100] * len(start) + answer


def padded(pairs: list[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """Return the batch's input ids, attention mask and labels, each of shape (examples, longest)."""
    longest = max(len(ids) for ids, _ in pairs)
    return {
        "input_ids": torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in pairs]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in pairs]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in pairs]),
    }


if __name__ == "__main__":
    main()
