"""`fedllm audit` on updates: what the server can read off them, and that secure sums and noise stop it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance.families import save_family
from tiny import mostly_thorough, records, write_jsonl

from fedllm.runtime.audit import Audit, audit_job, audit_run

# A step of one example each round: the most that an update can give away.
SMALL: dict[str, Any] = {
    "federation.num_rounds": 2,
    "federation.weight_by": "equal",
    "train.optim": "sgd",
    "train.learning_rate": 0.3,
    "train.local_steps": 1,
    "train.per_device_train_batch_size": 1,
    "train.warmup_steps": 0,
    "train.lr_scheduler_type": "constant",
    "peft.r": 20,
    "peft.target_modules": ["q_proj", "k_proj", "v_proj"],
}
NOISE = {"unit": "example", "epsilon": 1.0, "accountant": "RDP"}


def audited(tiny: Any, *, texts: int = 6000) -> Audit:
    return audit_job(tiny.job(), canaries=20, texts=texts, output=tiny.folder / "audited")


def rows_of(audit: Audit, number: int, *, parties: bool) -> list[dict[str, Any]]:
    return [row for row in audit.updates if row["round"] == number and (row["whose"] != "the sum") == parties]


def test_words_are_read_off_small_updates_and_the_sum_alone_is_heard_under_secure_sums(
    make_federation: Callable[..., Any],
) -> None:
    plain = audited(make_federation("plain", job=SMALL))
    assert [(row["round"], row["whose"]) for row in plain.updates] == [
        (number, whose) for number in (1, 2) for whose in ("north", "east", "south", "the sum")
    ]
    # Factor B gives the words away in the first round, factor A later.
    for number in (1, 2):
        found = rows_of(plain, number, parties=True)
        assert min(row["auc"] for row in found) > 0.8 and np.mean([row["auc"] for row in found]) > 0.9
        assert min(row["found"] - row["by_chance"] for row in found) > 0.3
        assert all(row["attack"] == "span" and abs(row["auc_of_noise"] - 0.5) < 0.25 for row in found)
    secret = audited(make_federation("secret", job=SMALL | {"privacy.secure_aggregation": {"enabled": True}}))
    assert [(row["round"], row["whose"]) for row in secret.updates] == [(1, "the sum"), (2, "the sum")]
    # It is the same sum: which words there were is in it still, but not whose.
    for number in (1, 2):
        (seen,), (alone,) = (rows_of(audit, number, parties=False) for audit in (secret, plain))
        assert seen == alone


def test_noise_takes_the_words_to_chance(make_federation: Callable[..., Any]) -> None:
    job = SMALL | {"train.per_device_train_batch_size": 8, "privacy.differential_privacy": NOISE}
    sizes = dict.fromkeys(("north", "east", "south"), 40)
    rows = [
        row
        for number in range(3)
        for row in audited(make_federation(f"noisy{number}", sizes=sizes, job=job | {"seed": number})).updates
        if row["auc"] is not None
    ]
    assert len(rows) > 10
    # The better of four ways is above even by some luck.
    assert np.mean([row["auc"] - row["auc_of_noise"] for row in rows]) < 0.1
    quiet = job | {"privacy.differential_privacy": None, "train.per_device_train_batch_size": 2}
    heard = rows_of(audited(make_federation("quiet", sizes=sizes, job=quiet)), 2, parties=True)
    assert min(row["auc"] - row["auc_of_noise"] for row in heard) > 0.3


def test_going_on_with_an_audit_keeps_what_was_heard(make_federation: Callable[..., Any]) -> None:
    audit = audited(make_federation(job=SMALL))
    assert audit_run(audit.run).updates == audit.updates == json.loads((audit.run / "updates.json").read_text())


def without_dropout(folder: Path) -> str:
    """Return the folder of a model that drops nothing in training, so that its steps can be simulated exactly."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop")
    file.write_text(json.dumps(config | {name: 0.0 for name in names if name in config}))
    return str(folder)


def of_family(make_federation: Callable[..., Any], folder: Path, family: str, job: dict[str, Any]) -> Any:
    model = without_dropout(save_family(family, "causal_lm", folder / family))
    tiny = make_federation(job={"model.model_name_or_path": model, **job})
    for party in ("north", "east", "south"):
        rows = [{"text": row["completion"]} for row in records(party, 6)]
        for name in (f"{party}.jsonl", f"{party}-eval.jsonl"):
            write_jsonl(tiny.folder / "data" / name, rows)
    return tiny


@pytest.mark.parametrize("noise", [False, True])
def test_where_there_is_no_span_a_search_finds_words(
    noise: bool, make_federation: Callable[..., Any], tmp_path: Path
) -> None:
    """GPT-2 adds places to words, so no word has one input."""
    job = SMALL | {"peft.target_modules": "all-linear", "data.max_length": 8, "federation.num_rounds": 1}
    job |= {"privacy.differential_privacy": NOISE} if noise else {}
    found = audited(of_family(make_federation, tmp_path, "gpt2", job))
    rows = [row for row in rows_of(found, 1, parties=True) if row["found"] is not None]
    assert all(row["attack"] == "search" and row["auc"] is None for row in rows)
    more = [row["found"] - row["by_chance"] for row in rows]
    if noise:
        assert not more or np.mean(more) < 0.2
    else:
        assert len(more) == 3 and np.mean(more) > 0.4
        # By chance it is one of 300.
        assert np.mean([row["right_places"] for row in rows]) > 0.3


OTHERS: dict[str, dict[str, Any]] = {
    "ranks": {"federation.ranks": {"north": 3}},
    "FlexLoRA, ranks": {"federation.lora_rule": "FlexLoRA", "federation.ranks": {"north": 3}},
    "FLoRA": {"federation.lora_rule": "FLoRA", "train.optimizer_state": "reset"},
    "FFA-LoRA": {"federation.lora_rule": "FFA-LoRA"},
    "RoLoRA": {"federation.lora_rule": "RoLoRA"},
    "FedSA-LoRA": {"federation.lora_rule": "FedSA-LoRA"},
    "int8": {"federation.codec": {"name": "int8"}},
    "AdamW": {"train.optim": "adamw_torch", "train.learning_rate": 0.01},
    "parts": {"federation.fraction_train": 0.5},
}


@pytest.mark.parametrize("case", mostly_thorough(OTHERS, "FlexLoRA, ranks", "FLoRA", "int8"))
def test_every_rule_and_codec_is_heard(case: str, make_federation: Callable[..., Any]) -> None:
    found = audited(make_federation(job=SMALL | OTHERS[case]))
    last = rows_of(found, 2, parties=True)
    assert len(last) == (2 if case == "parts" else 3)
    assert np.mean([row["auc"] for row in last]) > 0.8


@pytest.mark.parametrize("method", [{"peft_type": "IA3"}, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}])
def test_what_has_no_factors_is_searched(method: dict[str, Any], make_federation: Callable[..., Any]) -> None:
    job = {key: value for key, value in SMALL.items() if not key.startswith("peft")} | {"peft": method}
    found = audited(make_federation(job=job | {"data.max_length": 16}), texts=500)
    assert len(found.updates) == 8 and {row["attack"] for row in found.updates} == {"search"}
    assert all(0 <= row["found"] <= 1 for row in found.updates)


def test_a_classifier_s_text_is_searched_with_the_label_that_fits_best(
    make_federation: Callable[..., Any], tmp_path: Path
) -> None:
    job = {key: value for key, value in SMALL.items() if not key.startswith("peft")}
    model = without_dropout(save_family("bert", "sequence_classification", tmp_path / "bert"))
    job |= {"model.model_name_or_path": model}
    job |= {"federation.num_rounds": 1, "data.task": "sequence_classification", "data.labels": ["no", "yes"]}
    tiny = make_federation(job=job | {"peft": {"peft_type": "BITFIT"}, "data.max_length": 8})
    for party in ("north", "east", "south"):
        rows = [{"text": row["completion"], "label": ["no", "yes"][i % 2]} for i, row in enumerate(records(party, 6))]
        for name in (f"{party}.jsonl", f"{party}-eval.jsonl"):
            write_jsonl(tiny.folder / "data" / name, rows)
    found = audited(tiny).updates
    assert [row["attack"] for row in found] == ["search"] * 4
    assert np.mean([row["found"] - row["by_chance"] for row in found[:3]]) > 0.3


def test_what_an_encoder_reads_and_a_decoder_writes_is_not_attacked(
    make_federation: Callable[..., Any], tmp_path: Path
) -> None:
    job = {"model.model_name_or_path": str(save_family("t5", "seq2seq_lm", tmp_path / "t5"))}
    job |= {"data.task": "seq2seq_lm", "peft": {"r": 2, "target_modules": "all-linear"}, "federation.num_rounds": 1}
    assert audited(make_federation(job=job)).updates == []


def test_without_texts_to_try_nothing_is_searched(make_federation: Callable[..., Any]) -> None:
    job = {key: value for key, value in SMALL.items() if not key.startswith("peft")}
    rows = audited(make_federation(job=job | {"peft": {"peft_type": "IA3"}}), texts=0).updates
    assert len(rows) == 8 and {row["found"] for row in rows} == {None}
