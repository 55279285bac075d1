"""`fedllm config`: every setting of a job with its value and origin."""

from __future__ import annotations

import json

import typer

from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson, JobFile, Overrides


def config(job_file: JobFile, *, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print every setting of a job with its value and where it came from."""
    from fedllm.job.job import Job
    from fedllm.runs.plan_files import effective

    rows = effective(Job.from_yaml(job_file, overrides=overrides))
    if as_json:
        print_json(rows)
        return
    width = max(len(row["key"]) for row in rows)
    for row in rows:
        typer.echo(f"{row['key']:<{width}}  {json.dumps(row['value'], ensure_ascii=False):<24}  {row['origin']}")
