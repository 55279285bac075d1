"""`fedllm doctor`: is this machine ready?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.cli.join import Site
from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson
from fedllm.errors import ConfigError, ExitCode, FedllmError

if TYPE_CHECKING:
    from fedllm.runtime.doctor import Finding


def doctor(
    job_file: Annotated[Path | None, typer.Argument(help="Look also at what this job needs here.")] = None,
    *,
    party: Annotated[Path | None, typer.Option(help="Look over a site: its own party file.")] = None,
    project: Annotated[Path | None, typer.Option(help="Look over a coordinator: its project file.")] = None,
    site: Site = None,
    constraints: Annotated[
        Path | None, typer.Option(help="Compare the installed versions with pip's constraints, the same at all sites.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look over this machine, and with --party or --project over a site or a coordinator; each fault with its mend."""
    if party is not None and project is not None:
        fix = "call it once at the site, and once at the coordinator"
        raise ConfigError("BAD_COMBINATION", "`--party` and `--project` together", where="--project", fix=fix)
    findings = _findings(job_file, party, project, site)
    if constraints is not None:
        from fedllm.runtime.doctor import constrained

        findings += constrained(constraints)
    code = ExitCode.RESOURCES if any(item.state == "fault" for item in findings) else ExitCode.OK
    if as_json:
        print_json([asdict(item) for item in findings], status="error" if code else "ok", exit_code=code)
    else:
        _show(findings)
    if code:
        raise typer.Exit(int(code))


def _findings(job_file: Path | None, party: Path | None, project: Path | None, site: Path | None) -> list[Finding]:
    from fedllm.runtime.doctor import examine
    from fedllm.runtime.doctor_site import examine_party, examine_project

    of_job, num_threads = _of_job(job_file, party, project, site) if job_file is not None else ([], None)
    folder = (party or project or Path("runs/here")).resolve().parent
    findings = examine(folder, num_threads=num_threads)
    if party is not None:
        findings += examine_party(party, site=site)
    if project is not None:
        findings += examine_project(project)
    return findings + of_job


def _of_job(
    job_file: Path, party: Path | None, project: Path | None, site: Path | None
) -> tuple[list[Finding], int | None]:
    from fedllm.job.job import Job, load_parties
    from fedllm.runtime.doctor import Finding
    from fedllm.runtime.doctor_site import examine_job, examine_submission, faulty
    from fedllm.runtime.validate import validate

    try:
        job = Job.from_yaml(job_file)
        threads = job.runtime.num_threads
        if party is not None:
            return examine_job(job, party, site=site), threads
        if project is not None:
            return examine_submission(job, project), threads
        facts = validate(job, load_parties(job))
        return [Finding("job", "ok", f"valid, digest {facts.digests['job']}")], threads
    except FedllmError as error:
        return [faulty("job", each) for each in (error, *error.also)], None


def _show(findings: list[Finding]) -> None:
    width = max(len(item.name) for item in findings)
    for item in findings:
        typer.echo(f"{item.state.upper():<5} {item.name:<{width}}  {item.detail}")
        if item.fix:
            typer.echo(f"      {'':<{width}}  fix: {item.fix}")
    faults = sum(item.state == "fault" for item in findings)
    warnings = sum(item.state == "warn" for item in findings)
    counts = [
        f"{count} {word}{'s' if count > 1 else ''}"
        for count, word in ((faults, "fault"), (warnings, "warning"))
        if count
    ]
    typer.echo(", ".join(counts) or "all is well")
