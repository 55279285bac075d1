"""report.html: one file that says how a run went. No script, no request; every string from the run is escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fedllm.disk import write_atomic
from fedllm.runs.charts import Drawing, number_text
from fedllm.runs.digests import renew
from fedllm.runs.report_data import RunRecord, added, privacy_text, read_run
from fedllm.runs.report_events import clock_text, event_rows, event_summary, failures_of
from fedllm.runs.report_ownership import ownership_facts
from fedllm.runs.report_panels import (
    bytes_chart,
    curves,
    delivery_text,
    score_text,
    seconds_text,
    size_text,
    time_chart,
)

_TEMPLATES = Path(__file__).with_name("templates")

# Control characters, lone surrogates, and the marks that turn the direction of the text around them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")

_VERDICTS = {
    "SUCCESS": ("good", "\u2713"),
    "PARTIAL": ("fair", "\u25d0"),
    "PAUSED": ("fair", "\u2016"),
    "FAILED": ("bad", "\u2715"),
}

# Column of comparison.json and its heading.
_SCORES = (
    ("rouge1", "ROUGE-1"),
    ("rouge2", "ROUGE-2"),
    ("rougeL", "ROUGE-L"),
    ("bleu4", "BLEU-4"),
    ("accuracy", "Accuracy"),
    ("loss_nats", "Loss, nats per target"),
    ("perplexity_per_token", "Perplexity per token"),
    ("perplexity_per_byte", "Perplexity per byte"),
    ("examples", "Examples"),
)


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder from the files in it and return its path.

    What is absent is called "not available" in its panel. The same files give the same bytes.

    Args:
        run: The run folder; `job.yaml` must be in it.

    Raises:
        ConfigError: `RUN_NOT_FOUND`.
        ResourceError: `DISK_FULL`.
    """
    path = run / "report.html"
    write_atomic(path, render_report(read_run(run)).encode())
    renew(run, [path.name])
    return path


def render_report(record: RunRecord) -> str:
    """Return the report as HTML.

    Args:
        record: What the run folder says.
    """
    text: str = _environment().get_template("report.html.j2").render(_context(record))
    return text


@cache
def _environment() -> Any:
    """Return what holds the templates, compiled once in a process."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number_text, "size": size_text, "seconds": seconds_text}
    environment.filters |= {"plain": value_text, "clock": clock_text, "origin": origin_text}
    return environment


def printable(value: Any) -> Any:
    """Return a value that a template prints with its unprintable characters replaced.

    Args:
        value: A value; what is no plain string is returned as it is.
    """
    return _UNPRINTABLE.sub("\ufffd", value) if type(value) is str else value


def value_text(value: Any) -> str:
    """Return a setting's value as it would stand in the job file.

    Args:
        value: A JSON-like value.
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def origin_text(origin: Any) -> str:
    """Return where a value came from, without the folder: a report is sent to others.

    Args:
        origin: For instance `/home/ann/job.yaml:12`, `flag` or `default`.
    """
    return re.split(r"[\\/]", str(origin))[-1]


def _context(record: RunRecord) -> dict[str, Any]:
    settings = record.settings()
    return {
        "title": record.setting("name") or record.path.resolve().name,
        "scenario": record.setting("scenario") or record.provenance.get("scenario"),
        "base_model": record.setting("model.model_name_or_path") or record.provenance.get("model_name_or_path"),
        "started": record.provenance.get("started"),
        "verdict": _verdict(record),
        "figures": _figures(record),
        "comparison": _comparison(record),
        "curves": curves(record),
        "parties": _parties(record),
        "bytes_chart": bytes_chart(record),
        "time_chart": time_chart(record),
        "events": event_rows(record.events),
        "event_summary": event_summary(record.events),
        "chosen": [row for row in settings if row.get("origin") != "default"],
        "defaults": [row for row in settings if row.get("origin") == "default"],
        "job_text": "" if settings else (record.path / "job.yaml").read_text(encoding="utf-8", errors="replace"),
        "provenance": _provenance(record),
        "ownership": ownership_facts(record),
    }


def _verdict(record: RunRecord) -> dict[str, Any]:
    result = record.result
    if not result:
        reason = "There is no verdict yet: the run is going on, or it was cut off."
        return {
            "status": "NO VERDICT",
            "tone": "fair",
            "sign": "?",
            "reason": reason,
            "next": f"fedllm resume {record.path}",
        }
    status = str(result.get("status"))
    reason = result.get("reason") or "No reason was given."
    if status == "SUCCESS" and not result.get("rounds"):
        # A run that did no work is never a success, whatever wrote the file.
        status, reason = "FAILED", f"No round was committed. {reason}"
    tone, sign = _VERDICTS.get(status, ("fair", "?"))
    return {"status": status, "tone": tone, "sign": sign, "reason": reason, "next": result.get("next")}


def _figures(record: RunRecord) -> list[tuple[str, str, str]]:
    """Return (label, figure, remark) for the row of key figures."""
    metrics, result = record.metrics, record.result
    done = result.get("rounds") if result else max(metrics.rounds, default=None)
    planned, delivered = record.setting("federation.num_rounds"), result.get("best_round")
    up, down = (sum(metrics.summed(f"bytes_{way}").values()) for way in ("up", "down"))
    at_server = sum(added(metrics.values(f"seconds_{part}") for part in ("wait", "aggregate", "write")).values())
    examples = sum(metrics.summed("examples", split="train").values())
    of_planned = f"of {planned} planned" if planned else ""
    return [
        ("Rounds", number_text(done), of_planned),
        ("Parties", number_text(len(record.party_names()) or None), ""),
        ("Delivered round", number_text(delivered), delivery_text(record)),
        ("Traffic", size_text(up + down or None), f"{size_text(up)} up, {size_text(down)} down" if up + down else ""),
        ("Time in rounds", seconds_text(at_server or None), "at the server"),
        _last_figure(record, examples),
    ]


def _last_figure(record: RunRecord, examples: float) -> tuple[str, str, str]:
    if privacy := privacy_text(record):
        # How many examples were drawn has had no noise, so nobody counts them.
        figure, _, remark = privacy.removeprefix("epsilon ").partition(" per ")
        return ("Epsilon spent", figure, f"per {remark}")
    return ("Examples trained on", number_text(examples or None), "repeats counted")


def _comparison(record: RunRecord) -> dict[str, Any]:
    rows = record.comparison_rows()
    columns = [(key, label) for key, label in _SCORES if any(row.get(key) is not None for row in rows)]
    return {
        "columns": columns,
        "rows": [
            {
                "model": str(row.get("model")),
                "kind": str(row.get("kind")),
                "cells": [(key, score_text(key, row.get(key))) for key, _ in columns],
                "bar": _percent(row.get("rougeL", row.get("accuracy"))),
            }
            for row in rows
        ],
        "sentence": record.comparison.get("sentence"),
        "bleu_signature": record.comparison.get("bleu_signature"),
        "rouge_tokenizer": record.comparison.get("rouge_tokenizer"),
    }


def _percent(value: Any) -> float:
    return round(min(max(float(value), 0.0), 100.0), 1) if isinstance(value, int | float) else 0.0


def _parties(record: RunRecord) -> dict[str, Any]:
    facts = {str(row.get("party")): row for row in record.parties}
    rows = [_party(record, party, facts.get(party, {})) for party in record.party_names()]
    summed = {key: _total([row[key] for row in rows]) for key in _PARTY_SUMS}
    return {"rows": rows, "sums": summed}


_PARTY_SUMS = (
    "train_examples",
    "held_out_examples",
    "examples",
    "tokens",
    "steps",
    "seconds",
    "bytes_up",
    "bytes_down",
)


def _party(record: RunRecord, party: str, facts: dict[str, Any]) -> dict[str, Any]:
    metrics = record.metrics

    def total(name: str, split: str | None = None) -> float | None:
        return _total(list(metrics.values(name, split=split, party=party).values()))

    return {
        "party": party,
        "train_examples": facts.get("train_examples"),
        "held_out_examples": facts.get("held_out_examples"),
        "rounds": len(metrics.values("steps", split="train", party=party)) or None,
        "examples": total("examples", "train"),
        "tokens": total("tokens", "train"),
        "steps": total("steps", "train"),
        "seconds": total("seconds_compute"),
        "bytes_up": _total([total("bytes_up"), total("bytes_after_up")]),
        "bytes_down": _total([total("bytes_down"), total("bytes_after_down")]),
        "failures": failures_of(record.events, party),
    }


def _total(values: Sequence[Any]) -> float | None:
    known = [value for value in values if isinstance(value, int | float)]
    return sum(known) if known else None


def _provenance(record: RunRecord) -> dict[str, Any]:
    found = record.provenance
    own = record.result.get("adapter_sha256")
    digests = [(key.replace("_", " "), value) for key, value in found.items() if key.endswith("_digest") and value]
    facts = {key: found.get(key) for key in ("scenario", "model_name_or_path", "seed", "num_threads", "run_id")}
    hides = record.setting("privacy.differential_privacy.unit")
    seen = {True: "the server saw sums alone", False: "none: the server could see each update"}
    facts["secure aggregation"] = seen.get(record.setting("privacy.secure_aggregation.enabled"))
    facts["privacy"] = "no differential privacy" if hides == "none" else privacy_text(record)
    facts["started"] = f"{clock_text(found['started'])} UTC" if found.get("started") else None
    return {
        "digests": [*digests, ("adapter SHA-256", own)] if own else digests,
        "facts": [(key, value) for key, value in facts.items() if value is not None],
        "machine": sorted(found["machine"].items()) if isinstance(found.get("machine"), dict) else [],
        "versions": sorted(found["versions"].items()) if isinstance(found.get("versions"), dict) else [],
    }


def charts_of(record: RunRecord) -> list[Drawing]:
    """Return all charts of a run's report, in its order.

    Args:
        record: What the run folder says.
    """
    drawn = [*curves(record), bytes_chart(record), time_chart(record)]
    return [drawing for drawing in drawn if drawing is not None]
