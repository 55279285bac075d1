"""`fedllm submit`: hand a job to the project's server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson, JobFile, Overrides

Project = Annotated[Path, typer.Option("--project", help="The project file.")]


def submit(
    job_file: JobFile, *, project: Project = Path("project.yaml"), overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Hand a job to the project's server; it begins once every party is connected and has approved it."""
    from fedllm.job.job import Job
    from fedllm.runtime.coordinator import submit as submit_job

    job = Job.from_yaml(job_file, overrides=overrides)
    run = submit_job(job, project)
    if as_json:
        print_json({"run": str(run), "job_digest": job.digest})
        return
    typer.echo(f"run      {run}")
    typer.echo(f"digest   {job.digest}")
    typer.echo(f"parties  {', '.join(job.parties)}: each approves it with fedllm approve job.yaml --party party.yaml")
    if overrides:
        typer.echo(f"         with --set it is another job than {job_file}: they approve {run / 'job.yaml'}")
    typer.echo(f"next     fedllm status {run}")
