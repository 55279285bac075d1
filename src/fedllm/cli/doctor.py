"""`fedllm doctor`: is this machine ready?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson
from fedllm.errors import ExitCode


def doctor(
    job_file: Annotated[Path | None, typer.Argument(help="Look also at what this job needs.")] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Look over this machine: versions, disk, memory, cores, device; with a job, its files and digests too."""
    from fedllm.errors import FedllmError
    from fedllm.runtime.doctor import Finding, examine

    findings: list[Finding] = []
    threads = None
    if job_file is not None:
        from fedllm.job.job import Job, load_parties
        from fedllm.runtime.validate import validate

        try:
            job = Job.from_yaml(job_file)
            threads = job.runtime.num_threads
            facts = validate(job, load_parties(job))
            findings.append(Finding("job", "ok", f"valid, digest {facts.digests['job']}"))
        except FedllmError as error:
            what = f"[{error.code}] {error.where}: {error.what}"
            findings.append(Finding("job", "fail", what, error.fix or f"`fedllm validate {job_file}` says more"))
    findings = examine(Path("runs"), num_threads=threads) + findings
    code = ExitCode.RESOURCES if any(item.state == "fail" for item in findings) else ExitCode.OK
    if as_json:
        print_json([asdict(item) for item in findings], status="error" if code else "ok", exit_code=code)
    else:
        for item in findings:
            typer.echo(f"{item.state:<5} {item.name:<14} {item.detail}")
            if item.fix:
                typer.echo(f"      {'':<14} fix: {item.fix}")
    if code:
        raise typer.Exit(int(code))
