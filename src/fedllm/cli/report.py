"""`fedllm report`: write a run's report again."""

from __future__ import annotations

import typer

from fedllm.cli.output import print_json
from fedllm.cli.resume import RunArgument
from fedllm.cli.run import AsJson


def report(run: RunArgument, *, as_json: AsJson = False) -> None:
    """Write a run's report.html from its files and print where it is."""
    from fedllm.runs.folder import run_identity
    from fedllm.runs.report import write_report

    run_identity(run)
    path = write_report(run)
    if as_json:
        print_json({"report": str(path)})
    else:
        typer.echo(str(path))
