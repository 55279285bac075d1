"""`fedllm plan`: what a run will cost and who will see what."""

from __future__ import annotations

from dataclasses import asdict

import typer

from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson, JobFile, Overrides


def plan(job_file: JobFile, *, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show what a run will cost: parameters, bytes, time, memory; and who will see what."""
    from fedllm.job.job import Job, load_parties
    from fedllm.runtime.plan import make_plan
    from fedllm.runtime.validate import validate

    job = Job.from_yaml(job_file, overrides=overrides)
    parties = load_parties(job)
    found = make_plan(job, parties, validate(job, parties))
    if as_json:
        print_json(asdict(found))
        return
    typer.echo(f"job        {job.name}, digest {job.digest}")
    typer.echo(f"trainable  {found.trainable_parameters:,} parameters")
    typer.echo("bytes      per round, as encoded:")
    for party in job.parties:
        typer.echo(f"  {party:<10} {size(found.bytes_up[party])} up, {size(found.bytes_down[party])} down")
    typer.echo(f"  in all     {size(found.total_bytes)} over {found.num_rounds} rounds")
    if found.package_bytes:
        what = "before round 0: once from its owner, and once to each party that lacks it"
        typer.echo(f"package    {size(found.package_bytes)} {what}")
    typer.echo(
        f"time       about {found.seconds_total:.0f} s on this machine ({1000 * found.seconds_per_step:.0f} ms a step, "
        f"{job.runtime.num_threads} threads)"
    )
    typer.echo(
        f"memory     about {size(found.peak_memory_bytes)} with one base model for all parties here; "
        f"{size(found.party_memory_bytes)} of it for each party's optimiser"
    )
    for noise in found.noise:
        typer.echo(f"privacy    {noise.party}: {noise.text}")
    for line in found.ownership:
        typer.echo(f"ownership  {line}")
    typer.echo("who sees what:")
    for line in found.who_learns_what:
        typer.echo(f"  - {line}")


def size(num_bytes: float) -> str:
    """Return a number of bytes as `1.2 MB`.

    Args:
        num_bytes: How many.
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
