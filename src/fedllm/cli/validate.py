"""`fedllm validate`: check a job without training."""

from __future__ import annotations

import typer

from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson, JobFile, Overrides


def validate(job_file: JobFile, *, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a job, its parties, their data and the base model. Nothing is trained."""
    from fedllm.job.job import Job, load_parties
    from fedllm.runtime.validate import validate as validate_job

    job = Job.from_yaml(job_file, overrides=overrides)
    facts = validate_job(job, load_parties(job))
    if as_json:
        print_json(facts.to_json())
        return
    typer.echo(f"{job_file}: valid")
    for name, digest in facts.digests.items():
        typer.echo(f"  {name:<10} {digest}")
    typer.echo(f"  trainable  {facts.skeleton.num_trainable():,} parameters")
    for party in facts.parties:
        held_out = party.held_out.kept if party.held_out else 0
        train = party.train
        typer.echo(
            f"  {party.party:<10} {train.kept} training and {held_out} held-out examples; "
            f"{train.truncated} cut at {job.data.max_length} tokens, {train.dropped} dropped"
        )
