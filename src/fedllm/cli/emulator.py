"""`fedllm emulator`: the package that others get of an owner's model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.cli.live import console
from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson, JobFile, Overrides, Quiet
from fedllm.errors import ConfigError, EmulatorRefused

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedllm.runtime.emulator import Owner

app = typer.Typer(help="Offsite tuning: make and check what others get of your model.", no_args_is_help=True)
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder to write. Default: where the job looks for its base model."),
]


@app.command("build")
def build(
    job_file: Annotated[Path | None, typer.Argument(help="The job file.", show_default=False)] = None,
    *,
    overrides: Overrides = None,
    party: Annotated[
        Path | None,
        typer.Option(help="Without a job: the owner's own file; what a job would say is assumed."),
    ] = None,
    output: Output = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """At the owner: make the package that others get, if it keeps to your export policy."""
    from fedllm.runtime.emulator import assumed
    from fedllm.runtime.emulator import build as build_package

    with _shown(as_json=as_json):
        _check_options(job_file, party)
        owner = _owner(job_file, overrides) if job_file else _without_job(party, output, overrides)
        told = {} if job_file else {"assumed": assumed(owner.job)}
        if told and not as_json:
            typer.echo("assumed  " + ", ".join(f"{key} {value}" for key, value in told["assumed"].items()))
        report = build_package(owner, output=output, say=_say(quiet=quiet))
        _show(report.to_json() | told, as_json=as_json)
        if not as_json:
            first = f"fedllm validate {job_file} && fedllm run {job_file}"
            then = "name it in a job; `fedllm emulator check JOB` measures it as that job tunes it"
            typer.echo(f"next     {first if job_file else then}")


def _check_options(job_file: Path | None, party: Path | None) -> None:
    if job_file is not None and party is not None:
        what, fix = "a job has its owner's file beside it", "leave out `--party`, or the job"
        raise ConfigError("BAD_COMBINATION", what, where="--party", fix=fix)


def _without_job(party: Path | None, output: Path | None, overrides: list[str] | None) -> Owner:
    from fedllm.runtime.emulator import owner_without_job

    if party is None or output is None:
        fix = "for instance `fedllm emulator build --party party.yaml --output package`"
        raise ConfigError("MISSING_KEY", "give a job, or `--party` and `--output`", where="JOB", fix=fix)
    return owner_without_job(party, output=output, overrides=overrides or [])


@app.command("check")
def check(job_file: JobFile, *, overrides: Overrides = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """At the owner: measure a package that is there, and say whether it keeps to your export policy."""
    from fedllm.runtime.emulator import check as check_package
    from fedllm.runtime.emulator import refuse

    with _shown(as_json=as_json):
        report = check_package(_owner(job_file, overrides), say=_say(quiet=quiet))
        refuse(report)
        _show(report.to_json(), as_json=as_json)


def _owner(job_file: Path, overrides: list[str] | None) -> Owner:
    from fedllm.job.job import Job
    from fedllm.runtime.emulator import owner_of

    return owner_of(Job.from_yaml(job_file, overrides=overrides))


@contextmanager
def _shown(*, as_json: bool) -> Iterator[None]:
    """Print the figures of a package that is refused too: they say why."""
    try:
        yield
    except EmulatorRefused as error:
        _show(error.report, as_json=as_json, exit_code=error.exit_code)
        if as_json:
            raise typer.Exit(int(error.exit_code)) from None
        raise


def _say(*, quiet: bool) -> Callable[[str], None]:
    err = console()
    return (lambda text: None) if quiet else (lambda text: err.print(f"{text} ..."))


def _show(facts: dict[str, Any], *, as_json: bool, exit_code: int = 0) -> None:
    if as_json:
        print_json(facts, status="ok" if facts["allowed"] else "refused", exit_code=exit_code)
        return
    for name, loss in facts["losses_nats"].items():
        typer.echo(f"{name:<26} {loss:.3f}")
    if facts["recovered"] is not None:
        typer.echo(f"Plug recovers {facts['recovered']:.0%} of what FT gains")
    typer.echo(f"package  {facts['package']}  ({'may leave' if facts['allowed'] else 'may not leave'})")
