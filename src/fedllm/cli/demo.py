"""`fedllm demo`: the main job from nothing to a table, on this machine, with the network off."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.compare import show_comparison
from fedllm.cli.live import console, live_view
from fedllm.cli.run import AsJson, Quiet


def demo(
    folder: Annotated[Path, typer.Option(help="Where the job and its run go.")] = Path("fedllm-demo"),
    *,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Three organisations tune a small model together; see what each could do alone. A few minutes, no network."""
    from fedllm.job.job import Job
    from fedllm.runtime.compare import compare
    from fedllm.runtime.scaffold import write_job_folder

    # A second call goes on where the first was stopped, or shows its result.
    job_file = folder / "job.yaml"
    if not job_file.exists():
        write_job_folder(folder)
    if not quiet:
        console().print(
            "Three organisations sell different products. Each has its own adverts, and no other's. They tune one "
            "small language model to write adverts, without showing each other their data.",
        )
    with live_view(quiet=quiet) as watch:
        comparison = compare(Job.from_yaml(job_file), output=folder / "run", watch=watch)
    show_comparison(comparison, as_json=as_json)
    if not as_json:
        typer.echo(f"next     fedllm eval {folder / 'run'} --show     (read what the models write)")
        typer.echo("         fedllm init my-job                      (the same with your own data)")
