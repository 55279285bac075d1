"""The reference implementation: TRL prepares the same examples into the same tokens and targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedllm.data.batches import IGNORED
from fedllm.data.formats import ColumnMap
from fedllm.data.settings import DataSettings
from fedllm.data.tokens import tokenise
from fedllm.seeds import global_generators_kept, global_torch_stream

USER, ANSWER = {"role": "user", "content": "问 one"}, {"role": "assistant", "content": "answer 二"}


def labels_of_trl(record: dict[str, Any], tokenizer: PreTrainedTokenizerFast, folder: Path) -> tuple[Any, Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with global_torch_stream(0, "test"):
        model = LlamaForCausalLM(config)
    arguments = SFTConfig(output_dir=str(folder), report_to=[], use_cpu=True, max_length=64)
    with global_generators_kept():
        data = Dataset.from_list([record])
        row = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer).train_dataset[0]
    return list(row["input_ids"]), list(row["labels"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "红色 dress:", "completion": " 丝绸 silk"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"text": "a b 丝绸"},
    ],
)
def test_tokens_and_targets_are_those_of_trl(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ids, labels = labels_of_trl(record, tokenizer, tmp_path)
    (layout,) = ColumnMap().matching(record)
    ours = tokenise(ColumnMap().example(layout, record), tokenizer, DataSettings())
    assert list(ours.input_ids) == ids
    # The first label is dropped by the shift. A line break after the stop token is trained by TRL and not here.
    stop = ids.index(tokenizer.eos_token_id) + 1
    expected = [IGNORED, *labels[1:stop], *[IGNORED] * (len(ids) - stop)]
    pairs = zip(ours.input_ids, ours.loss_mask, strict=True)
    assert [token if wanted else IGNORED for token, wanted in pairs] == expected
