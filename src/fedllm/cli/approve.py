"""`fedllm approve`: what a job will do at this site; sign it, list or withdraw what was signed."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.cli.plan import size
from fedllm.cli.run import AsJson
from fedllm.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from fedllm.job.approval import Approval
    from fedllm.runtime.approvals import Desk
    from fedllm.runtime.consequences import Consequences


def approve(
    job_file: Annotated[Path | None, typer.Argument(help="The job file.", show_default=False)] = None,
    *,
    party: Annotated[Path, typer.Option(help="The site's own file; its folder `site-NAME` is beside it.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Approve without a question.")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="List the jobs that are approved here.")] = False,
    withdraw: Annotated[
        str | None, typer.Option(help="Withdraw the approval of the job with this digest, or beginning of one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a job will do at this site, and sign its digest with the site's key. Nothing is trained or sent."""
    from fedllm.runtime.approvals import Desk

    if [job_file is not None, show_list, withdraw is not None].count(True) != 1:
        fix = "for instance `fedllm approve job.yaml --party party.yaml`"
        raise ConfigError("BAD_COMBINATION", "give a job file, or `--list`, or `--withdraw DIGEST`", fix=fix)
    desk = Desk.open(party)
    if show_list:
        _list(desk, as_json=as_json)
    elif withdraw is not None:
        _withdraw(desk, withdraw, as_json=as_json)
    elif job_file is not None:
        _decide(desk, job_file, yes=yes, as_json=as_json)


def _decide(desk: Desk, job_file: Path, *, yes: bool, as_json: bool) -> None:
    from fedllm.job.job import Job

    job = Job.from_yaml(job_file)
    found = desk.look(job)
    if as_json:
        approval = desk.approve(job) if yes else None
        print_json(asdict(found) | {"approval": approval and approval.model_dump()})
        return
    _show(found, desk)
    if not yes and not _confirmed(found):
        typer.echo("not approved")
        raise typer.Exit(int(ExitCode.REFUSED))
    _approved(desk.approve(job))


def _confirmed(found: Consequences) -> bool:
    if not sys.stdin.isatty():
        fix = "read what is printed above, then add `--yes`"
        raise ConfigError("MISSING_KEY", "there is no terminal to ask at, and no `--yes`", where="--yes", fix=fix)
    return typer.confirm(f"Approve this job for {found.party}?", default=False, err=True)


def _approved(approval: Approval) -> None:
    typer.echo(f"approved   {approval.job_digest} for {approval.party}, at {approval.approved_at}")
    typer.echo("           any change of the job, or of this site's limits, ends the approval")


def _show(found: Consequences, desk: Desk) -> None:
    kit, method = desk.kit, found.method
    typer.echo(f"job        {found.job} ({found.scenario}), digest {found.job_digest}")
    typer.echo(f"with       {', '.join(found.parties)}; server {kit.host}:{kit.port}; project {kit.project}")
    trained = "some" if found.trainable_parameters is None else f"{found.trainable_parameters:,}"
    typer.echo(f"trains     {trained} parameters on {found.base}")
    typer.echo("           " + ", ".join(f"{key} {_plain(value)}" for key, value in method.items() if value))
    for read in found.data:
        typer.echo(f"reads      {read.source}")
        cut = "" if read.truncated is None else f"; {read.truncated} cut, {read.dropped} dropped"
        typer.echo(f"           {read.use}: {read.examples} examples{cut}")
    typer.echo(f"work       {found.num_rounds} rounds of {found.steps_per_round} steps")
    for line in _traffic(found):
        typer.echo(line)
    typer.echo(f"privacy    {found.noise}")
    typer.echo(f"answers    {', '.join(found.operations)}")
    if found.operations_refused:
        typer.echo(f"refuses    {', '.join(found.operations_refused)}")
    typer.echo("who sees what:")
    for line in found.who_learns_what:
        typer.echo(f"  - {line}")
    if found.ownership:
        typer.echo("claims and copies:")
    for line in found.ownership:
        typer.echo(f"  - {line}")
    typer.echo("limits of this site:")
    for rule in found.limits:
        typer.echo(f"  {'holds' if rule.holds else 'BROKEN':<6} {rule.key}: asked {rule.asked}; allowed {rule.allowed}")


def _traffic(found: Consequences) -> list[str]:
    up, in_all, down = found.bytes_up_per_round, found.bytes_up_in_all, found.bytes_down_per_round
    if up is None or in_all is None or down is None:
        return ["goes out   how much is known once the package is here; it is held against this site's limits then"]
    return [
        f"goes out   at most {size(up)} in a round, {size(in_all)} in all",
        f"comes in   about {size(down)} in a round",
    ]


def _plain(value: object) -> str:
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else str(value)


def _list(desk: Desk, *, as_json: bool) -> None:
    found = desk.list()
    if as_json:
        print_json([item.to_json() for item in found])
        return
    if not found:
        typer.echo(f"no job is approved at {desk.kit.name}")
    for item in found:
        approval = item.approval
        typer.echo(f"{approval.job_digest}  {approval.approved_at}  {approval.job_name}")
        if item.why_not:
            typer.echo(f"  does not hold: {item.why_not}")


def _withdraw(desk: Desk, digest: str, *, as_json: bool) -> None:
    approval = desk.withdraw(digest)
    if as_json:
        print_json({"withdrawn": approval.job_digest})
        return
    typer.echo(f"withdrawn  {approval.job_digest} ({approval.job_name})")
    typer.echo("           a run that has begun goes on until it starts again; `fedllm stop` ends it")
