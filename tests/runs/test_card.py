"""The adapter's model card: front matter that the hub reads, honest text, nothing private."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from sample_run import JOB, write_json, write_sample_run

from fedllm.errors import ConfigError
from fedllm.runs.card import code_span, model_card, one_line, plain_markdown

HOSTILE = "no\n---\nlicense: mit\n<script>alert(1)</script> | `x` # [a](http://b) \u202e\x00"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_sample_run(tmp_path / "run")


def test_front_matter_is_what_the_hub_expects(run: Path) -> None:
    data = ModelCard(model_card(run)).data
    assert (data.base_model, data.library_name, data.model_name) == ("models/adverts-base", "peft", "adverts")
    assert {"fedllm", "federated-learning", "lora"} <= set(data.tags)
    found = {(result.dataset_type, result.metric_name): result.metric_value for result in data.eval_results}
    assert found["federation-common", "ROUGE-L"] == 75.8
    assert found["federation-common", "Loss, nats per target"] == 0.452
    assert found["federation-held-out", "Loss, nats per target"] == pytest.approx(
        1.02 * (0.35 + 2.6 * 0.78**10 + 0.004), abs=1e-4
    )


def test_text_says_how_it_was_trained_protected_and_loaded(run: Path) -> None:
    text = model_card(run)
    assert "- Parties: 3\n- Rounds: 12\n- Delivered round: 10 (lowest held-out loss)" in text
    assert "| `train.learning_rate` | `0.005` |" in text
    assert "| ROUGE-L | 31.2 | 54.4 | 80.9 | 75.8 |" in text
    assert "Updates were not hidden from the server" in text
    assert "No differential privacy was applied" in text
    assert 'base = "models/adverts-base"' in text
    compile(re.findall(r"```python\n(.*?)```", text, re.S)[0], "card", "exec")


def test_no_party_and_no_folder_is_named(run: Path) -> None:
    path = "/home/alice/secret-models/adverts-base"
    provenance = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    write_json(run / "provenance.json", provenance | {"model_name_or_path": path})
    text = model_card(run)
    assert not re.search("north|south|east|alice|secret|data/test.jsonl", text)
    assert ModelCard(text).data.base_model == "adverts-base"


@pytest.mark.parametrize(
    ("known_as", "shown"),
    [("org/model-7b", "org/model-7b"), ("gpt2", "gpt2"), ("/srv/a b/base", "base"), ("C:\\models\\base", "base")],
)
def test_base_model_is_the_one_in_the_adapters_own_config(run: Path, known_as: str, shown: str) -> None:
    (run / "adapter").mkdir()
    write_json(run / "adapter" / "adapter_config.json", {"base_model_name_or_path": known_as})
    assert ModelCard(model_card(run)).data.base_model == shown


def test_without_a_comparison_the_losses_are_the_results(run: Path) -> None:
    (run / "comparison.json").unlink()
    names = {result.metric_name for result in ModelCard(model_card(run)).data.eval_results}
    assert names == {"Loss, nats per target", "Perplexity per token", "Perplexity per byte"}


def test_a_folder_with_only_a_job_gives_a_card(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB, encoding="utf-8")
    text = model_card(tmp_path)
    assert ModelCard(text).data.base_model == "unknown"
    assert "It was not evaluated." in text


def test_without_a_job_it_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="RUN_NOT_FOUND"):
        model_card(tmp_path)


def test_hostile_strings_stay_text(run: Path) -> None:
    for name in ("config", "provenance", "comparison"):
        path = run / f"{name}.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        if name == "config":
            for row in found["values"]:
                row["value"] = HOSTILE if isinstance(row["value"], str) else row["value"]
        else:
            found = {key: HOSTILE if isinstance(value, str) else value for key, value in found.items()}
        write_json(path, found)
    text = model_card(run)
    data = ModelCard(text).data
    assert data.license is None
    assert data.model_name == one_line(HOSTILE)
    assert text.count("\n---\n") == 1
    body = text.split("\n---\n", 1)[1]
    outside_code = re.sub(r"```.*?```|(`+)(?!`).*?(?<!`)\1(?!`)", "", body, flags=re.S)
    assert "<script>" not in re.sub(r"\\<", "", outside_code)
    assert "\u202e" not in text and "\x00" not in text


@pytest.mark.parametrize(
    ("text", "span"), [("a", "`a`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("a|b", "`a\\|b`"), ("```", "```` ``` ````")]
)
def test_code_spans_hold_any_text(text: str, span: str) -> None:
    assert code_span(text) == span


def test_markdown_shows_as_it_is_written() -> None:
    assert plain_markdown("a_b <c> [d]") == r"a\_b \<c\> \[d\]"
