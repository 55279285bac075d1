"""The model card of an adapter: README.md in Hugging Face's format, with front matter that the hub reads."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path, PureWindowsPath
from typing import Any

from fedllm.models.settings import OWN_TYPES
from fedllm.runs.charts import number_text
from fedllm.runs.folder import CANARIES
from fedllm.runs.jsonl import Row
from fedllm.runs.report_data import RunRecord, added, privacy_text, read_run
from fedllm.runs.report_ownership import card_line
from fedllm.runs.report_panels import delivery_text, score_text
from fedllm.tasks import AUTO_CLASSES, CAUSAL_LM, CLASSIFICATION, SEQ2SEQ_LM, Task, TaskName

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~&$])")

# Name of a metric -> (its type on the hub, its name for the reader).
_SCORES = {
    "rouge1": ("rouge", "ROUGE-1"),
    "rouge2": ("rouge", "ROUGE-2"),
    "rougeL": ("rouge", "ROUGE-L"),
    "bleu4": ("bleu", "BLEU-4"),
    "accuracy": ("accuracy", "Accuracy, percent"),
    "loss_nats": ("loss", "Loss, nats per target"),
    "perplexity_per_token": ("perplexity", "Perplexity per token"),
    "perplexity_per_byte": ("perplexity", "Perplexity per byte"),
}
_PIPELINES: dict[TaskName, str] = {
    CAUSAL_LM: "text-generation",
    SEQ2SEQ_LM: "text2text-generation",
    CLASSIFICATION: "text-classification",
}
_SPLITS = {"common": "Test set that no party trained on", "held_out": "Held-out data of the parties"}

# These sections say how the adapter was trained. The others name parties and folders, which stay private.
_SECTIONS = ("federation.", "peft.", "train.", "privacy.")

_PROTECTION = """## What was and what was not protected

- Each party's examples stayed on its own machines. Adapter updates, example counts and losses were sent.
"""
_IN_THE_CLEAR = """- **Updates were not hidden from the server.** There was no secure aggregation: whoever runs
  the server could look at a single party's update, and an update can tell something about the data behind it.
"""
_SUMS = """- **Updates were hidden from the server** by secure aggregation: it saw sums over the parties, and
  can tell from them something about the data of all, but not whose they are.
"""
_CANARIES = """- **This adapter was made for an audit: random canaries were trained into it.** Do not release it.
"""
_NO_NOISE = """- **No differential privacy was applied.** There is no bound on what this adapter remembers of single
  examples; do not publish it if that matters before you have tested what it gives away.
"""
_NOISE = """- **Differential privacy was applied**{how}: {text}. What this adapter tells of a
  single {unit} of the training data is bounded by it. Held-out examples, by which a round may have been chosen,
  numbers of examples, and what other runs on the same data told are not in this figure.
"""


def model_card(run: Path) -> str:
    """Return the README.md of a run's adapter: front matter, training, results, protection, how to load it.

    It names no party and no folder, since an adapter may be published.

    Args:
        run: The run folder; `job.yaml` must be in it.

    Raises:
        ConfigError: `RUN_NOT_FOUND`.
    """
    record = read_run(run)
    name = one_line(record.setting("name") or "federated adapter")
    base, results = _base_model(record), _results(record)
    parties = len(record.party_names())
    who = f"{parties} parties that each kept their data" if parties else "parties that each kept their data"
    intro = f"An adapter for {code_span(base)}, tuned together by {who}. Made with fedllm.\n"
    return "\n".join(
        [
            f"---\n{_front_matter(record, name=name, base=base, results=results)}---\n",
            f"# {plain_markdown(name)}\n",
            intro,
            _training(record, parties),
            _result_text(record, results),
            _PROTECTION
            + _sums_text(record)
            + (_CANARIES if (run / CANARIES).exists() else "")
            + _noise_text(record)
            + card_line(record),
            _loading(base, _task(record), own=record.setting("peft.peft_type") in OWN_TYPES),
            _provenance(record),
        ]
    )


def _sums_text(record: RunRecord) -> str:
    return _SUMS if record.setting("privacy.secure_aggregation.enabled") else _IN_THE_CLEAR


def _noise_text(record: RunRecord) -> str:
    text = privacy_text(record)
    if text is None:
        return _NO_NOISE
    unit = record.setting("privacy.differential_privacy.unit")
    how = " to the sum of the parties' updates" if unit == "party" else " by each party in its training"
    return _NOISE.format(how=how, text=plain_markdown(text), unit=unit)


def own_card(name: str, base: str, task: Task, *, hides: str = "none") -> str:
    """Return the README.md of an adapter that is one party's own; it names no party.

    Args:
        name: The job.
        base: The base model, without the folders above it.
        task: What it is tuned to do.
        hides: The unit of the job's differential privacy.
    """
    bound = "without differential privacy: there is no bound on what it remembers of\nthem."
    if hides != "none":
        bound = f"with differential privacy per {hides}; the run's report says how\nmuch was spent."
    bound += " Do not publish it if that matters before you have tested what it gives away."
    return f"""---
library_name: peft
pipeline_tag: {_PIPELINES[task.name]}
tags: [fedllm, federated-learning, lora]
---

# {plain_markdown(one_line(name))}: one party's own adapter

An adapter for {code_span(one_line(base))}, made with fedllm by FedSA-LoRA: factor A is the same for all parties of the
job, factor B is this party's own and never left its site. The other parties have other adapters, and there is none for
all.

B was trained on this party's examples alone, {bound}

{_loading(one_line(base), task)}"""


def copy_card(name: str, base: str, task: Task) -> str:
    """Return the README.md of one party's copy of the adapter that all tuned; it names no party.

    Args:
        name: The job.
        base: The base model, without the folders above it.
        task: What it is tuned to do.
    """
    return f"""---
library_name: peft
pipeline_tag: {_PIPELINES[task.name]}
tags: [fedllm, federated-learning, lora]
---

# {plain_markdown(one_line(name))}: one party's copy

An adapter for {code_span(one_line(base))}, tuned together by several parties. Made with fedllm.

Each party of the job has a copy of its own. They differ a little in factor B, so that a copy that is found where it
should not be tells whose it was. Figures of the adapter, and what was protected, are in the run's report.

{_loading(one_line(base), task)}"""


def one_line(value: Any) -> str:
    """Return a value as one line of printable text.

    Args:
        value: A string, or anything that has a text.
    """
    return _UNPRINTABLE.sub(" ", str(value)).strip()


def plain_markdown(text: str) -> str:
    """Return text that Markdown shows as it is written.

    Args:
        text: One line.
    """
    return _MARKDOWN.sub(r"\\\1", text)


def code_span(text: str) -> str:
    """Return a Markdown code span, also fit for a table cell.

    Args:
        text: One line.
    """
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, pad = "`" * (longest + 1), " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", r"\|")


def _base_model(record: RunRecord) -> str:
    """Return the base model's hub id, or the last part of a folder's path: the rest may be private."""
    asked = record.provenance.get("model_name_or_path") or record.setting("model.model_name_or_path")
    name = one_line(_adapter_config(record).get("base_model_name_or_path") or asked or "")
    if _HUB_ID.fullmatch(name):
        return name
    return PureWindowsPath(name).name or "unknown"


def _adapter_config(record: RunRecord) -> Row:
    try:
        found = json.loads((record.path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _results(record: RunRecord) -> dict[str, dict[str, float]]:
    """Return split -> metric -> value of the delivered adapter."""
    federated = next((row for row in record.comparison_rows() if row.get("kind") == "federated"), {})
    compared = {name: float(federated[name]) for name in _SCORES if isinstance(federated.get(name), int | float)}
    number = record.result.get("best_round")
    if number is None:
        number = max(record.metrics.rounds, default=0)
    found = {}
    for split in _SPLITS:
        by_name = {name: record.metrics.values(name, split=split).get(number) for name in _SCORES}
        found[split] = {name: value for name, value in by_name.items() if value is not None}
    found["common"] |= compared
    ordered = {split: {name: values[name] for name in _SCORES if name in values} for split, values in found.items()}
    return {split: values for split, values in ordered.items() if values}


def _front_matter(record: RunRecord, *, name: str, base: str, results: dict[str, dict[str, float]]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    pipeline = _PIPELINES[_task(record).name]
    found = [
        EvalResult(
            task_type=pipeline,
            dataset_type=f"federation-{split.replace('_', '-')}",
            dataset_name=_SPLITS[split],
            metric_type=_SCORES[metric][0],
            metric_name=_SCORES[metric][1],
            metric_value=round(value, 4),
        )
        for split, values in results.items()
        for metric, value in values.items()
    ]
    method = one_line(record.setting("peft.peft_type") or "lora").lower()
    data = ModelCardData(
        base_model=base,
        library_name="fedllm" if record.setting("peft.peft_type") in OWN_TYPES else "peft",
        pipeline_tag=pipeline,
        tags=["fedllm", "federated-learning", method],
        model_name=name if found else None,
        eval_results=found or None,
    )
    return data.to_yaml() + "\n"


def _training(record: RunRecord, parties: int) -> str:
    metrics, result = record.metrics, record.result
    rounds, best = result.get("rounds"), result.get("best_round")
    steps = sum(metrics.summed("steps", split="train").values())
    tokens = sum(metrics.summed("tokens", split="train").values())
    ways = ("up", "down", "after_up", "after_down")
    traffic = sum(added(metrics.summed(f"bytes_{way}") for way in ways).values())
    facts = {
        "Scenario": record.setting("scenario") or record.provenance.get("scenario"),
        "Parties": parties or None,
        "Rounds": rounds,
        "Rank of this adapter": _rank_text(record),
        "Delivered round": None if best is None else f"{best} ({delivery_text(record)})",
        "Optimiser steps, all parties": number_text(steps) if steps else None,
        "Target tokens, all parties, repeats counted": number_text(tokens) if tokens else None,
        "Bytes sent, all parties, both ways": number_text(traffic) if traffic else None,
    }
    lines = [f"- {label}: {plain_markdown(one_line(value))}" for label, value in facts.items() if value is not None]
    return "\n".join(["## How it was trained\n", *lines, "", *_settings_table(record)])


def _rank_text(record: RunRecord) -> str | None:
    rank, trained = _adapter_config(record).get("r"), record.setting("peft.r")
    if rank == trained or not isinstance(rank, int) or trained is None:
        return None
    return f"{rank}, of which each round trained {trained}; the rest is what the rounds added to the base"


def _settings_table(record: RunRecord) -> list[str]:
    rows = [row for row in record.settings() if str(row.get("key")).startswith(_SECTIONS)]
    if not rows:
        return []
    table = ["| setting | value |", "|---|---|"]
    for row in rows:
        value = one_line(json.dumps(row.get("value"), ensure_ascii=False))
        table.append(f"| {code_span(one_line(row['key']))} | {code_span(value)} |")
    return [*table, ""]


def _result_text(record: RunRecord, results: dict[str, dict[str, float]]) -> str:
    tables = {split: {"this adapter": values} for split, values in results.items()}
    if "common" in tables:
        tables["common"] = _others(record.comparison_rows()) | tables["common"]
    lines = ["## Results\n"]
    for split, models in tables.items():
        lines += [f"{_SPLITS[split]}:\n", f"| metric | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
        for name in results[split]:
            cells = [score_text(name, values.get(name)) for values in models.values()]
            lines.append(f"| {_SCORES[name][1]} | {' | '.join(cells)} |")
        lines.append("")
    for key, label in (("bleu_signature", "BLEU"), ("rouge_tokenizer", "ROUGE words")):
        if record.comparison.get(key):
            lines.append(f"{label}: {code_span(one_line(record.comparison[key]))}\n")
    return "\n".join(lines if results else [*lines, "It was not evaluated.\n"])


def _others(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Return model -> metric -> value of the models it was compared with, the single parties as their mean."""
    kinds = {"base": "base model", "alone": "parties alone, mean", "pooled": "all data pooled"}
    found: dict[str, dict[str, float]] = {}
    for kind, label in kinds.items():
        same = [row for row in rows if row.get("kind") == kind]
        values = {name: [row[name] for row in same if isinstance(row.get(name), int | float)] for name in _SCORES}
        found[label] = {name: statistics.fmean(known) for name, known in values.items() if known}
    return {label: values for label, values in found.items() if values}


def _task(record: RunRecord) -> Task:
    return Task(record.setting("data.task") or CAUSAL_LM, tuple(record.setting("data.labels") or ()))


def _loading(base: str, task: Task, *, own: bool = False) -> str:
    name, auto_class = json.dumps(base, ensure_ascii=False), AUTO_CLASSES[task.name]
    library, load = ("fedllm", "load_adapter") if own else ("peft", "PeftModel.from_pretrained")
    labels = {number: one_line(label) for number, label in enumerate(task.labels)}
    head = f", id2label={labels!r}" if labels else ""
    return f"""## How to load it

```python
from {library} import {load.partition(".")[0]}
from transformers import {auto_class}, AutoTokenizer

base = {name}  # a hub id, or the folder of your copy
model = {load}({auto_class}.from_pretrained(base{head}), "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained(base)
```

The licence of the base model applies to what you make of it.
"""


def _provenance(record: RunRecord) -> str:
    found = record.provenance
    digests = {key: value for key, value in found.items() if key.endswith("_digest") and value}
    digests |= {"adapter_sha256": record.result.get("adapter_sha256")}
    versions: Any = found.get("versions")
    lines = [f"- {key.replace('_', ' ')}: {code_span(one_line(value))}" for key, value in digests.items() if value]
    lines += [
        f"- {plain_markdown(one_line(key))} {code_span(one_line(value))}" for key, value in dict(versions or {}).items()
    ]
    if found.get("seed") is not None:
        lines.append(f"- seed {plain_markdown(one_line(found['seed']))}")
    return "\n".join(["## Provenance\n", *(lines or ["Not available."]), ""])
