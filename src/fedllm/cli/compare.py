"""`fedllm compare`: base model, each party alone, federated and pooled data on one test set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from fedllm.cli.live import live_view
from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson, JobFile, Output, Overrides, Quiet, adapter_text

if TYPE_CHECKING:
    from fedllm.runtime.compare import Comparison

COLUMNS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "bleu4": "BLEU-4"}
COLUMNS |= {"accuracy": "accuracy", "loss_nats": "loss"}


def compare(
    job_file: JobFile,
    *,
    overrides: Overrides = None,
    output: Output = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare base model, each party alone, federated, and pooled data, on one test set."""
    from fedllm.job.job import Job
    from fedllm.runtime.compare import compare as run_comparison

    job = Job.from_yaml(job_file, overrides=overrides)
    with live_view(quiet=quiet) as watch:
        comparison = run_comparison(job, output=output, watch=watch)
    show_comparison(comparison, as_json=as_json)


def show_comparison(comparison: Comparison, *, as_json: bool) -> None:
    """Print the table, its sentence, and where everything is.

    Args:
        comparison: What was found.
        as_json: Print the JSON envelope instead.
    """
    result = comparison.result
    if as_json:
        data = {"rows": comparison.rows, "sentence": comparison.sentence, "recovered": comparison.recovered}
        adapter = str(result.adapter) if result.adapter_sha256 else None
        print_json(data | {"run": str(result.path), "adapter": adapter}, status=result.status)
        return
    print_table(comparison.rows)
    first = comparison.rows[0]
    typer.echo(f"\n{comparison.sentence}")
    if "bleu_signature" in first:
        typer.echo(f"BLEU: {first['bleu_signature']}   ROUGE tokenizer: {first['rouge_tokenizer']}")
    typer.echo(f"\nadapter  {adapter_text(result)}\nreport   {result.path / 'report.html'}")


def print_table(rows: list[dict[str, object]]) -> None:
    """Print rows of scores.

    Args:
        rows: Each with `model` and scores.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = {key: title for key, title in COLUMNS.items() if all(key in row for row in rows)}
    table = Table("model", box=box.SIMPLE_HEAD)
    for title in columns.values():
        table.add_column(title, justify="right")
    for row in rows:
        style = "bold" if row["kind"] == "federated" else ""
        digits = {key: 3 if key == "loss_nats" else 1 for key in columns}
        table.add_row(str(row["model"]), *(f"{row[key]:.{digits[key]}f}" for key in columns), style=style)
    Console(highlight=False).print(table)
