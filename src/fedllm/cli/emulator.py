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
from fedllm.errors import EmulatorRefused

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
    job_file: JobFile,
    *,
    overrides: Overrides = None,
    output: Output = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """At the owner: make the package that others get, if it keeps to your export policy."""
    from fedllm.runtime.emulator import build as build_package

    with _shown(as_json=as_json):
        report = build_package(_owner(job_file, overrides), output=output, say=_say(quiet=quiet))
        _show(report.to_json(), as_json=as_json)
        if not as_json:
            typer.echo(f"next     fedllm validate {job_file} && fedllm run {job_file}")


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
