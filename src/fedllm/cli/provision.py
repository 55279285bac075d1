"""`fedllm provision`: the coordinator lets sites into a project."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson

if TYPE_CHECKING:
    from fedllm.runtime.provision import Provisioned

ProjectFile = Annotated[Path, typer.Argument(help="The project file.", show_default=False)]
Requests = Annotated[list[Path] | None, typer.Option("--request", help="A party's request; repeatable.")]
Replace = Annotated[
    list[str] | None,
    typer.Option("--replace", metavar="PARTY", help="Accept another key than this party had; repeatable."),
]


def provision(
    project_file: ProjectFile, *, requests: Requests = None, replace: Replace = None, as_json: AsJson = False
) -> None:
    """Make the project's certificates and a start-up kit for each party that sent a request."""
    from fedllm.identity.files import CoordinatorFolder
    from fedllm.job.project import Project
    from fedllm.runtime.provision import provision as provision_project

    project = Project.from_yaml(project_file)
    folder = CoordinatorFolder.beside(project_file)
    done = provision_project(folder, project, requests=requests or [], replace=replace or [])
    if as_json:
        print_json(done.to_json())
        return
    typer.echo(f"authority {done.authority}{', new' if done.authority_is_new else ''}")
    typer.echo("          tell it to the parties by another way than the kits; they install with --authority")
    typer.echo(f"server    {folder.site}, reached at {project.server.host}, port {project.server.port}")
    _print_parties(done)
    for name in done.missing:
        typer.echo(f"waiting   for {name}: `fedllm request party.yaml` there, then here")
        typer.echo(f"          `fedllm provision {project_file} --request FILE`")


def _print_parties(done: Provisioned) -> None:
    for name, kit in done.kits.items():
        typer.echo(f"kit       {kit.path}: {'new' if kit.is_new else 'as before'}, valid until {kit.expires:%Y-%m-%d}")
        typer.echo(f"          {name} has the key {kit.key}")
    written = [name for name, kit in done.kits.items() if kit.is_new]
    if done.roster_changed:
        typer.echo("roster    changed: every party installs its new kit, and `fedllm serve` is started anew")
    if written:
        typer.echo(f"next      send {', '.join(written)} their kits; there: `fedllm install KIT party.yaml`")
