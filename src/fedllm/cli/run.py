"""`fedllm run`: run a job with all its parties on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.cli.live import console, live_view
from fedllm.cli.output import print_json

if TYPE_CHECKING:
    from fedllm.runtime.run import RunResult

JobFile = Annotated[Path, typer.Argument(help="The job file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key.path=value that wins over the file; repeatable.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Run folder. Default: runs/NAME-DIGEST.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Worker processes to share the parties; 0: none.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
# Where each party has its own; only those of this machine.
OWN_ADAPTERS = "parties/*/adapter"
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def run(
    job_file: JobFile,
    *,
    overrides: Overrides = None,
    output: Output = None,
    workers: Workers = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a job with all its parties on this machine."""
    from fedllm.job.job import Job
    from fedllm.runtime.run import run_local

    job = Job.from_yaml(job_file, overrides=overrides)
    with live_view(quiet=quiet) as watch:
        result = run_local(job, output=output, num_workers=workers, watch=watch)
    show_result(result, as_json=as_json)


def show_result(result: RunResult, *, as_json: bool) -> None:
    """Print where the results of a run are and what to do next.

    Args:
        result: The result.
        as_json: Print the JSON envelope instead.
    """
    adapter = str(result.adapter) if result.adapter_sha256 else None
    paths = {"run": str(result.path), "adapter": adapter, "report": str(result.path / "report.html")}
    if as_json:
        facts = {"rounds": result.rounds, "best_round": result.best_round, "adapter_sha256": result.adapter_sha256}
        print_json(paths | facts, status=result.status)
        return
    out = console()
    best = "" if result.best_round in (None, result.rounds) else f"; round {result.best_round}, the best, is delivered"
    out.print(f"[bold]{result.status}[/bold]: {result.rounds} rounds committed{best}")
    typer.echo(f"adapter  {adapter_text(result)}")
    typer.echo(f"report   {paths['report']}")
    is_here = result.adapter_sha256 or (any(result.path.glob(OWN_ADAPTERS)) and not _kept_from_clients(result))
    typer.echo(f"next     fedllm {'eval' if is_here else 'report'} {result.path}")


def _kept_from_clients(result: RunResult) -> str:
    """Return who has what, where no adapter is written for the base model."""
    from fedllm.runs.plan_files import read_plan
    from fedllm.runtime.delivery import whereabouts

    return whereabouts(result.path, read_plan(result.path)[0])


def adapter_text(result: RunResult) -> str:
    """Return where a finished run's adapter is; where each party has its own, or there is none, who has what.

    Args:
        result: The result.
    """
    if result.adapter_sha256 or not result.is_finished:
        return str(result.adapter)
    if told := _kept_from_clients(result):
        return f"none. {told}"
    if any(result.path.glob(OWN_ADAPTERS)):
        return f"{result.path / 'parties' / 'NAME' / 'adapter'}  (each party has its own)"
    return "each party has its own, at its site: parties/NAME/adapter of the run there"
