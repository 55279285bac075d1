"""The shipped demo files are the ones their scripts make, small, and fit to be trained on."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import fedllm

ROOT = Path(__file__).parent.parent
ASSETS = Path(fedllm.__file__).parent / "assets" / "demo"
LARGEST_BYTES = 8 * 1024 * 1024


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "make_demo_data.py"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSETS / "base")


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_asset_has_its_recorded_digest(script: dict[str, Any]) -> None:
    assert json.loads((ASSETS / "DIGESTS.json").read_text(encoding="utf-8")) == script["digests"](ASSETS)


def test_the_data_script_makes_the_shipped_data_bit_for_bit(script: dict[str, Any], tmp_path: Path) -> None:
    script["write_data"](tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    shipped = {path.relative_to(ASSETS / "data"): path.read_bytes() for path in ASSETS.rglob("*.jsonl")}
    assert shipped == made


def test_no_test_input_occurs_in_a_training_file() -> None:
    trained = {row["prompt"] for path in ASSETS.rglob("train.jsonl") for row in _rows(path)}
    tested = {row["prompt"] for row in _rows(ASSETS / "data" / "test.jsonl")}
    assert trained and tested and not trained & tested


def test_the_assets_stay_under_eight_megabytes() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= LARGEST_BYTES


def test_the_tokenizer_puts_the_begin_token_first_and_gives_every_text_back(tokenizer: Any) -> None:
    for text in ("type#dress*color#red\n", "Größe 38, naïve, 连衣裙 🙂", " two  spaces\r\n\ttab "):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_messages_and_prompt_completion_give_the_same_tokens(tokenizer: Any) -> None:
    for row in _rows(ASSETS / "data" / "test.jsonl")[:20]:
        start = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        messages = [
            {"role": "user", "content": row["prompt"].strip()},
            {"role": "assistant", "content": row["completion"]},
        ]
        chat = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert start + answer == chat["input_ids"]
        assert [0] * len(start) + [1] * len(answer) == chat["assistant_masks"]
        assert start == tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]


def test_the_base_model_writes_adverts_that_end_and_carry_the_values_over(tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ASSETS / "base")
    assert {torch.float32} == {parameter.dtype for parameter in model.parameters()}
    carried = []
    for row in _rows(ASSETS / "data" / "test.jsonl")[:12]:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False)[0, ids.shape[1] :]
        assert written[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(written)
        carried += [pair.split("#")[1] in text for pair in row["prompt"].strip().split("*")]
    assert sum(carried) / len(carried) > 0.8
