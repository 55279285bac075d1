"""`fedllm eval`: judge the base model and a run's adapter on a test set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.compare import print_table
from fedllm.cli.output import print_json
from fedllm.cli.resume import RunArgument
from fedllm.cli.run import AsJson


def evaluate(
    run: RunArgument,
    *,
    data: Annotated[Path | None, typer.Option(help="Test file. Default: the job's common test set.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Show the first answers of each model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Judge the base model and a run's adapter on a test set."""
    from fedllm.runtime.judge import evaluate_run

    rows = evaluate_run(run, data=data)
    samples = {row["model"]: row.pop("samples", []) for row in rows}
    if as_json:
        print_json({"rows": rows})
        return
    print_table(rows)
    for model, texts in samples.items() if show else ():
        typer.echo(f"\n{model}:")
        for text in texts:
            typer.echo(f"  - {text}")
