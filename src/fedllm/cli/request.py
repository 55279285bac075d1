"""`fedllm request`: a site asks to be let into a project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson

PartyFile = Annotated[Path, typer.Argument(help="The site's party file.", show_default=False)]


def request(party_file: PartyFile, *, as_json: AsJson = False) -> None:
    """Make this site's private key, which stays here, and a request for a certificate to send to the coordinator."""
    from fedllm.identity.files import KEY_FILE, site_folder
    from fedllm.identity.requests import load_request, make_request
    from fedllm.job.loading import load_model
    from fedllm.job.party import Party

    party, _ = load_model(Party, party_file, overrides=[])
    site = site_folder(party_file, party.name)
    path = make_request(site, party.name)
    key = load_request(path, name=party.name).fingerprint
    if as_json:
        print_json({"name": party.name, "request": str(path), "key": key})
        return
    typer.echo(f"send      {path}")
    typer.echo("          to the project's coordinator; it holds nothing secret")
    typer.echo(f"key       {key}")
    typer.echo("          tell it to the coordinator by another way, so that nobody can send a request in your name")
    typer.echo(f"stays     {site / KEY_FILE} is the private key: send it to nobody")
    typer.echo(f"then      fedllm install {party.name}.zip {party_file} --authority FINGERPRINT")
