"""`fedllm ownership`: commit to a claim on a model before a run, and verify claims on a suspect model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson, JobFile, Overrides

app = typer.Typer(help="Claim a model that was tuned together, and verify claims.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Claim a model that was tuned together, and verify claims."""


@app.command()
def commit(
    job_file: JobFile,
    *,
    party: Annotated[
        Path | None, typer.Option(help="The party's own file. Default: all claimants' files beside the job.")
    ] = None,
    stamp: Annotated[
        Path | None, typer.Option(help="Attach this time stamp (RFC 3161) to the commitment that was made before.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Make a secret claim on a job's model, and the signed commitment to it; before the run."""
    from fedllm.job.job import Job, load_parties, load_party
    from fedllm.runtime.ownership import commit as commit_claims

    job = Job.from_yaml(job_file, overrides=overrides)
    parties = [load_party(party)] if party else load_parties(job)
    found = commit_claims(job, parties, stamp=stamp)
    if as_json:
        print_json([{"claim": str(path), **commitment.model_dump(mode="json")} for path, commitment in found])
        return
    for path, commitment in found:
        typer.echo(f"claim       {path}  (secret: it opens the commitment, and finds the mark)")
        typer.echo(f"commitment  {commitment.digest}  {commitment.party}, job {job.digest[:16]}")
