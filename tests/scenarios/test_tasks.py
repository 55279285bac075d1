"""Federations of classifiers, of encoders with a decoder, of other methods than LoRA, and on quantised bases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyFederation, make_tokenizer, save_base, write_jsonl
from tokenizers.processors import TemplateProcessing

from fedllm.errors import ConfigError, ModelError
from fedllm.evaluate.loss import LossSums, evaluate_examples
from fedllm.models.load import load_base
from fedllm.runtime.compare import compare
from fedllm.runtime.export import export
from fedllm.runtime.judge import evaluate_run
from fedllm.runtime.run import Watch, resume
from fedllm.runtime.site import open_site, party_tokens

Make = Callable[..., TinyFederation]
LABELS = ["coat", "dress", "shoe"]
WORDS = {"coat": "warm long wool", "dress": "silk red light", "shoe": "leather sole lace"}
TRAIN = {"train.local_steps": 12, "train.learning_rate": 0.02, "federation.num_rounds": 3}


def ending_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    special = [("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=special)
    return tokenizer


def save_small(folder: Path, model_class: str, config: Any) -> Path:
    """Write a random model of some class, with a tokenizer that ends its texts."""
    import transformers

    generator = torch.Generator().manual_seed(5)
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    ending_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT without a head."""
    from transformers import BertConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(make_tokenizer()), max_position_embeddings=64, pad_token_id=0, **sizes)
    return save_small(tmp_path_factory.mktemp("bert"), "BertModel", config)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random T5."""
    from transformers import T5Config

    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    tokenizer = make_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=0,
        **sizes,
    )
    return save_small(tmp_path_factory.mktemp("t5"), "T5ForConditionalGeneration", config)


def labelled(party: str, count: int) -> list[dict[str, Any]]:
    """Return texts whose words say what they are about; numbers and names of labels are mixed."""
    rows = []
    for i in range(count):
        label = LABELS[(i + len(party)) % 3]
        words = WORDS[label].split()
        text = f"{words[i % 3]} {words[(i + 1) % 3]}"
        rows.append({"text": text, "label": label if i % 2 else LABELS.index(label)})
    return rows


def classifiers(make: Make, encoder: Path, **changes: Any) -> TinyFederation:
    job = {"data.task": "sequence_classification", "data.labels": LABELS, "peft": {"r": 4}, **TRAIN, **changes}
    federation = make(base=encoder, sizes={"north": 12, "south": 9}, job=job)
    for path in (federation.folder / "data").glob("*.jsonl"):
        write_jsonl(path, labelled(path.stem, len(path.read_text().splitlines())))
    write_jsonl(federation.folder / "test.jsonl", labelled("test", 9))
    return federation


def test_classifiers_learn_together_and_say_how_often_they_are_right(make_federation: Make, encoder: Path) -> None:
    federation = classifiers(make_federation, encoder, **{"evaluate.test": "test.jsonl"})
    result = federation.run()
    values = {(row["round"], row["split"], row["name"]): row["value"] for row in result.rows() if row["party"] is None}
    assert values[3, "common", "loss_nats"] < values[0, "common", "loss_nats"]
    assert values[3, "held_out", "accuracy"] > values[0, "held_out", "accuracy"]
    assert values[3, "train", "tokens"] == values[3, "train", "examples"]
    assert (3, "held_out", "perplexity_per_token") not in values
    rows = {row["kind"]: row for row in evaluate_run(result.path)}
    assert rows["federated"]["accuracy"] == pytest.approx(values[result.best_round, "common", "accuracy"])
    assert rows["base"]["accuracy"] == pytest.approx(values[0, "common", "accuracy"])
    card = (result.path / "adapter" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert (
        "AutoModelForSequenceClassification.from_pretrained(base, id2label={0: 'coat', 1: 'dress', 2: 'shoe'})" in card
    )


def test_the_head_is_the_jobs_at_every_party_and_travels(make_federation: Make, encoder: Path) -> None:
    federation = classifiers(make_federation, encoder)
    job = federation.job()
    bases = [load_base(job.model, folder=encoder, task=job.task).model for _ in range(2)]
    assert torch.equal(bases[0].classifier.weight, bases[1].classifier.weight)
    assert bases[0].classifier.weight.std() == pytest.approx(0.02, rel=0.2)
    assert bases[0].config.id2label == dict(enumerate(LABELS))
    site = open_site(job, federation.parties())
    assert any("classifier" in name for name in site.model.manifest)


def test_labels_are_part_of_what_the_parties_agree_on(make_federation: Make, encoder: Path) -> None:
    first = classifiers(make_federation, encoder).job()
    turned = first.data.model_copy(update={"labels": LABELS[::-1]})
    assert first.model_copy(update={"data": turned}).digest != first.digest


def test_classifiers_can_be_compared_and_merged(make_federation: Make, encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    federation = classifiers(make_federation, encoder, **{"evaluate.test": "test.jsonl"})
    found = compare(federation.job(), output=federation.folder / "compared")
    result = found.result
    assert "accuracy" in found.sentence
    plain = AutoModelForSequenceClassification.from_pretrained(export(result.path, tmp_path / "merged", merge=True))
    site = open_site(federation.job(), federation.parties())
    held_out = party_tokens(site, federation.parties()[0]).held_out
    assert plain.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        scores = plain(torch.tensor([held_out[0].input_ids])).logits
    from fedllm.models.deliver import load_adapter

    base = load_base(federation.job().model, folder=encoder, task=federation.job().task).model
    with torch.no_grad():
        tuned = load_adapter(base, result.path / "adapter")(torch.tensor([held_out[0].input_ids])).logits
    torch.testing.assert_close(scores, tuned, atol=1e-4, rtol=1e-4)


def test_an_encoder_with_a_decoder_is_tuned_and_its_answers_are_judged(make_federation: Make, pair: Path) -> None:
    job = {"data.task": "seq2seq_lm", "peft": {"r": 4}, "evaluate.max_new_tokens": 6, **TRAIN}
    federation = make_federation(base=pair, sizes={"north": 6, "south": 5}, job=job)
    result = federation.run()
    losses = [
        row["value"]
        for row in result.rows()
        if (row["name"], row["split"], row["party"]) == ("loss_nats", "held_out", None)
    ]
    assert losses[-1] < losses[0]
    rows = evaluate_run(result.path, data=federation.folder / "data" / "north-eval.jsonl")
    assert {row["kind"] for row in rows} == {"base", "federated"}
    assert all("rougeL" in row and len(row["samples"]) == 3 for row in rows)


def test_adaloras_ranks_shrink_alike_and_end_at_the_target(make_federation: Make) -> None:
    peft = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "target_modules": ["q_proj", "v_proj"]}
    federation = make_federation(job={"peft": peft, **TRAIN, "federation.keep": "last"})
    result = federation.run()
    from safetensors.torch import load_file

    state = load_file(result.path / "adapter" / "adapter_model.safetensors")
    ranks = [int((tensor.abs() > 1e-6).sum()) for name, tensor in state.items() if "lora_E" in name]
    assert (sum(ranks), len(ranks)) == (2 * 4, 4)


class Stop(BaseException):
    """Ends a process after the first round."""


def _stop(number: int, rows: Any) -> None:
    if number == 1:
        raise Stop


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base wide enough for blocks of quantised weights."""
    return save_base(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_is_tuned_to_the_same_bits_again_and_merged_whole(
    bits: int, make_federation: Make, wide: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    job = {f"model.load_in_{bits}bit": True, "train.learning_rate": 0.02}
    federation = make_federation(base=wide, sizes={"north": 4, "south": 3}, job=job)
    whole = federation.run("whole")
    with pytest.raises(Stop):
        federation.run("broken", watch=Watch(on_round=_stop))
    assert resume(federation.folder / "broken").adapter_sha256 == whole.adapter_sha256
    plain = make_federation("plain", base=wide, sizes={"north": 4, "south": 3}, job={"train.learning_rate": 0.02})
    assert plain.run().adapter_sha256 != whole.adapter_sha256
    merged = AutoModelForCausalLM.from_pretrained(export(whole.path, tmp_path / "merged", merge=True))
    assert merged.dtype == torch.float32
    base = open_site(federation.job(), federation.parties()).base.model
    held = sum(weight.numel() * weight.element_size() for weight in base.model.layers.parameters())
    assert held < 0.3 * sum(weight.numel() * 4 for weight in merged.model.layers.parameters())


@pytest.mark.parametrize("rule", ["FedEx-LoRA", "FLoRA"])
def test_rules_that_add_to_the_base_leave_quantised_weights_alone(rule: str, make_federation: Make, wide: Path) -> None:
    from fedllm.models.deliver import load_adapter

    job = {"model.load_in_4bit": True, "federation.lora_rule": rule, "train.optimizer_state": "reset"}
    federation = make_federation(base=wide, job=job | {"train.learning_rate": 0.02, "federation.keep": "last"})
    result = federation.run()
    values = {(row["round"], row["split"], row["name"]): row["value"] for row in result.rows() if row["party"] is None}
    site = open_site(federation.job(), federation.parties())
    base = load_base(federation.job().model, folder=wide).model
    model = load_adapter(base, result.path / "adapter")
    sums = [
        evaluate_examples(model, party_tokens(site, located).held_out, pad_id=0, batch_size=4)
        for located in federation.parties()
    ]
    assert sum(sums, LossSums()).loss_nats == pytest.approx(values[2, "held_out", "loss_nats"], rel=1e-4)


def test_a_module_to_save_whose_weights_are_quantised_is_refused_by_name(make_federation: Make, wide: Path) -> None:
    job = {"model.load_in_4bit": True, "peft.modules_to_save": ["o_proj"]}
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.o_proj are held in 8 or 4 bits") as caught:
        make_federation(base=wide, job=job).run()
    assert caught.value.code == "PEFT_TARGET" and caught.value.fix
    # The output layer stays whole.
    assert make_federation("head", base=wide, job=job | {"peft.modules_to_save": ["lm_head"]}).run().best_round


def test_a_base_that_is_quantised_already_is_refused(make_federation: Make, tmp_path: Path) -> None:
    import json

    folder = save_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="quantisation of its own"):
        make_federation(base=folder).run()


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"peft": {"peft_type": "PROMPT_TUNING"}, "data.packing": True}, "several examples into one"),
        ({"peft": {"peft_type": "PREFIX_TUNING"}, "train.gradient_checkpointing": True}, "attention's cache"),
        ({"peft": {"peft_type": "ADALORA", "tinit": 2}}, "ranks stand in 3 rounds"),
        ({"peft": {"peft_type": "FULL"}, "model.dtype": "bfloat16"}, "FULL trains the base model's own values"),
        ({"peft": {"peft_type": "LN_TUNING"}, "model.dtype": "bfloat16"}, "LN_TUNING trains"),
        ({"peft": {"peft_type": "ADALORA"}, "model.dtype": "bfloat16"}, "PEFT's ADALORA mixes"),
        ({"peft": {"peft_type": "FULL"}, "model.load_in_4bit": True}, "weights held as nf4"),
        ({"peft": {"use_dora": True}, "model.load_in_8bit": True}, "DoRA needs the norms"),
        ({"peft": {"peft_type": "IA3"}, "model.load_in_8bit": True, "model.dtype": "bfloat16"}, "PEFT's IA3 mixes"),
        ({"model.load_in_8bit": True, "train.bf16": True}, "computes in bfloat16"),
    ],
)
def test_what_a_method_cannot_have_beside_it_is_refused(job: dict[str, Any], words: str, make_federation: Make) -> None:
    from fedllm.job.check import check_job

    federation = make_federation(job=job)
    with pytest.raises(ConfigError) as caught:
        check_job(federation.job(), federation.parties())
    assert [error.code for error in (caught.value, *caught.value.also) if words in error.what] == ["BAD_COMBINATION"]


def test_quantisation_without_its_library_says_what_to_install(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(Exception, match="bitsandbytes") as caught:
        make_federation(job={"model.load_in_8bit": True}).run()
    assert "pip install 'fedllm[bitsandbytes]'" in caught.value.fix  # type: ignore[attr-defined]
