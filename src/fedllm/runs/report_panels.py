"""The report's charts: which metrics they show, in which units, and what is said about them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from fedllm.aggregate.rules import RULES
from fedllm.runs.charts import (
    Drawing,
    Labels,
    Series,
    bar_chart,
    line_chart,
    number_text,
    party_series,
    stacked_series,
)
from fedllm.runs.jsonl import Row
from fedllm.runs.report_data import RunRecord, Values, added

_TEXT_SCORES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu4": "BLEU-4",
    "accuracy": "Accuracy",
}
_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
# Above this share of a round's change, another rule for LoRA's factors is suggested.
DRIFT_LIMIT = 0.1
_TIMES = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"), (1e-3, "milliseconds"))


def curves(record: RunRecord) -> list[Drawing]:
    """Return the charts over rounds that the run has numbers for: losses, LoRA's drift, then text scores.

    Args:
        record: What the run folder says.
    """
    losses = [_common_loss(record), _plugged_loss(record), _held_out_loss(record), _train_loss(record)]
    found = [*losses, _drift(record), *_text_scores(record)]
    return [drawing for drawing in found if drawing is not None]


def _common_loss(record: RunRecord) -> Drawing | None:
    values = record.metrics.values("loss_nats", split="common")
    note = "Broken lines: other models of the comparison, after their own training." if record.comparison_rows() else ""
    return line_chart(
        Labels("loss-common", "Loss on the common test set", "nats per target", note),
        [Series(_models(record), values, "lead")],
        references=_reference_lines(record.comparison_rows()),
        delivered=record.result.get("best_round"),
        gaps=record.metrics.lost("loss_nats", split="common"),
    )


def _plugged_loss(record: RunRecord) -> Drawing | None:
    """Offsite tuning: what the owner measured on its probe set."""
    names = {"plugged": "whole model, plugged (Plug)", "emulator": "emulator (OT-Emu)"}
    found = {words: record.metrics.values("loss_nats", split=split) for split, words in names.items()}
    note = "On the owner's probe set. Round 0 is each model as it was: Full-ZS, Emu-ZS." + _realigned(record)
    series = party_series({words: values for words, values in found.items() if values})
    return line_chart(Labels("loss-plugged", "The owner's model and its emulator", "nats per target", note), series)


def _realigned(record: RunRecord) -> str:
    """Return after which rounds the owner re-aligned the emulator, and after which it kept it as it was."""
    values = record.metrics.values("realigned")
    done, kept = ([number for number, value in values.items() if value == wanted] for wanted in (1, 0))
    words = f" Re-aligned after {_rounds(done)}." if done else ""
    if kept:
        words += f" The owner kept the emulator as it was after {_rounds(kept)}: "
        words += "the new one came no closer, or its policy or its look for blocks that must not leave forbade it."
    return words


def _rounds(numbers: list[int]) -> str:
    first, last = ", ".join(str(number) for number in numbers[:-1]), str(numbers[-1])
    return f"rounds {first} and {last}" if first else f"round {last}"


def _models(record: RunRecord) -> str:
    rule = record.setting("federation.lora_rule")
    keeps_state = rule in RULES and RULES[rule].keeps_state
    return "the parties' own models, mean" if keeps_state else "federated model"


def _reference_lines(rows: list[Row]) -> list[Series]:
    wanted = (("base", "base model"), ("alone", "parties alone, mean"), ("pooled", "all data pooled"))
    lines = []
    for number, (kind, name) in enumerate(wanted, start=1):
        losses = [row["loss_nats"] for row in rows if row.get("kind") == kind and _is_number(row.get("loss_nats"))]
        if losses:
            lines.append(Series(name, {0: statistics.fmean(losses)}, f"ref{number}"))
    return lines


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _held_out_loss(record: RunRecord) -> Drawing | None:
    metrics = record.metrics
    lead = Series("all parties", metrics.of_federation("loss_nats", split="held_out"), "lead")
    return line_chart(
        Labels("loss-held-out", "Loss on held-out data of the parties", "nats per target"),
        [lead, *party_series(metrics.by_party("loss_nats", split="held_out"))],
        gaps=metrics.lost("loss_nats", split="held_out"),
        delivered=record.result.get("best_round"),
    )


def _train_loss(record: RunRecord) -> Drawing | None:
    metrics = record.metrics
    lead = Series("all parties", metrics.of_federation("loss_nats", split="train"), "lead")
    return line_chart(
        Labels("loss-train", "Training loss", "nats per target", "Mean over each round's local steps."),
        [lead, *party_series(metrics.by_party("loss_nats", split="train"))],
        gaps=metrics.lost("loss_nats", split="train"),
    )


def _drift(record: RunRecord) -> Drawing | None:
    values = record.metrics.values("lora_drift")
    percent = {number: 100 * value for number, value in values.items() if value is not None}
    note = "The mean of LoRA's factors is off the mean of their products by this share of a round's change."
    high = {number: value for number, value in percent.items() if value > 100 * DRIFT_LIMIT}
    if high:
        worst = max(high, key=lambda number: high[number])
        note += (
            f" In {len(high)} of {len(percent)} rounds that was more than {DRIFT_LIMIT:.0%} (round {worst}: "
            f"{high[worst]:.0f}%): try federation.lora_rule RoLoRA or, with few parties, FedEx-LoRA; fewer "
            "local_steps; a lower learning_rate."
        )
    return line_chart(Labels("lora-drift", "Drift of LoRA's factors", "%", note), [Series("drift", percent, "lead")])


def _text_scores(record: RunRecord) -> Iterable[Drawing | None]:
    for split, words in (("common", "the common test set"), ("held_out", "held-out data")):
        found = {label: record.metrics.values(name, split=split) for name, label in _TEXT_SCORES.items()}
        series = party_series({label: values for label, values in found.items() if values})
        yield line_chart(Labels(f"scores-{split.replace('_', '-')}", f"Scores on {words}", "0 to 100"), series)


def bytes_chart(record: RunRecord) -> Drawing | None:
    """Return the chart of encoded bytes per round, both ways together, stacked by party.

    Args:
        record: What the run folder says.
    """
    up, down = (record.metrics.by_party(f"bytes_{way}") for way in ("up", "down"))
    by_party = {party: added([up.get(party, {}), down.get(party, {})]) for party in record.metrics.parties}
    series, unit = scaled(stacked_series(by_party), _SIZES)
    note = "As encoded, to and from each party. Round 0 holds the handshake and the first adapter."
    return bar_chart(Labels("bytes", "Bytes per round", unit, note), series)


def time_chart(record: RunRecord) -> Drawing | None:
    """Return the chart of the server's time per round: compute, wait, aggregate, write.

    While the server waits, parties compute; that part of the wait is shown as compute.

    Args:
        record: What the run folder says.
    """
    metrics = record.metrics
    waited, computed = metrics.values("seconds_wait"), metrics.summed("seconds_compute")
    compute = {n: min(value, waited.get(n, value)) for n, value in computed.items()}
    parts = {
        "compute": compute,
        "wait": {number: max(value - compute.get(number, 0.0), 0.0) for number, value in waited.items()},
        "aggregate": metrics.values("seconds_aggregate"),
        "write": metrics.values("seconds_write"),
    }
    series, unit = scaled(party_series(parts), _TIMES)
    note = "Compute: parties train while the server waits. Wait: the rest of it, such as evaluation and transport."
    return bar_chart(Labels("time", "Time per round at the server", unit, note), series)


def scaled(series: list[Series], units: Iterable[tuple[float, str]]) -> tuple[list[Series], str]:
    """Return series in the unit that suits their largest sum, and its name.

    Args:
        series: In the base unit.
        units: (factor, name), the largest first.
    """
    totals: Values = added(one.values for one in series)
    highest = max(totals.values(), default=0.0)
    known = list(units)
    factor, unit = next(((factor, name) for factor, name in known if highest >= factor), known[-1])
    return [Series(one.name, {n: v / factor for n, v in one.values.items()}, one.css) for one in series], unit


def delivery_text(record: RunRecord) -> str:
    """Return why the delivered round was chosen.

    Args:
        record: What the run folder says.
    """
    if record.result.get("best_round") is None:
        return "not available"
    judged = bool(record.metrics.of_federation("loss_nats", split="held_out"))
    return "lowest held-out loss" if judged and record.setting("federation.keep") != "last" else "the last one"


def score_text(name: str, value: object) -> str:
    """Return a metric's value for a table: text scores with one decimal, others with four digits.

    Args:
        name: The metric.
        value: Its value; a dash for what is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return number_text(None)
    return f"{value:.1f}" if name in _TEXT_SCORES else number_text(value)


def size_text(num_bytes: float | None) -> str:
    """Return a number of bytes in decimal units; a dash for None.

    Args:
        num_bytes: How many.
    """
    if num_bytes is None:
        return number_text(None)
    factor, unit = next(((f, name) for f, name in _SIZES if abs(num_bytes) >= f), (1.0, "B"))
    size = num_bytes / factor
    digits = f"{size:#.3g}".rstrip(".") if unit != "B" and size < 999.5 else f"{size:.0f}"
    return f"{digits}\u00a0{unit}"


def seconds_text(seconds: float | None) -> str:
    """Return a time in the two units that suit it; a dash for None.

    Args:
        seconds: How long.
    """
    if seconds is None:
        return number_text(None)
    if seconds < 60:
        return f"{seconds:.3g}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min {rest}\u00a0s"
    return f"{minutes // 60}\u00a0h {minutes % 60}\u00a0min"
