"""`fedllm install`: a site takes up the kit that the coordinator made for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.cli.request import PartyFile
from fedllm.cli.run import AsJson

KitFile = Annotated[Path, typer.Argument(metavar="KIT", help="The kit, NAME.zip.", show_default=False)]
Authority = Annotated[
    str | None, typer.Option("--authority", metavar="FINGERPRINT", help="The coordinator's, for the first kit.")
]


def install(kit_file: KitFile, party_file: PartyFile, *, authority: Authority = None, as_json: AsJson = False) -> None:
    """Verify a start-up kit and install it at this site, in place of an older one."""
    from fedllm.identity.files import site_folder
    from fedllm.identity.install import install_kit
    from fedllm.identity.kit import days_left, pinned
    from fedllm.job.loading import load_model
    from fedllm.job.party import Party

    party, _ = load_model(Party, party_file, overrides=[])
    site = site_folder(party_file, party.name)
    if authority is None and pinned(site) is None and not as_json and sys.stdin.isatty():
        authority = _confirmed(kit_file)
    kit = install_kit(kit_file, site, authority=authority, name=party.name)
    parties = [name for name in kit.roster if name != "server"]
    if as_json:
        found = {"project": kit.project, "name": kit.name, "server": f"{kit.host}:{kit.port}", "parties": parties}
        print_json(found | {"site": str(site), "authority": kit.authority, "expires": kit.expires.isoformat()})
        return
    typer.echo(f"installed {site}")
    typer.echo(f"project   {kit.project}: {', '.join(parties)}; the server is {kit.host}, port {kit.port}")
    typer.echo(f"authority {kit.authority}")
    typer.echo(f"valid     until {kit.expires:%Y-%m-%d}, {days_left(kit)} days")
    typer.echo(f"next      fedllm join {party_file}")


def _confirmed(kit_file: Path) -> str:
    from fedllm.identity.install import kit_authority

    found = kit_authority(kit_file)
    typer.echo(f"The kit is from the authority\n  {found}", err=True)
    typer.confirm("Did the coordinator tell you the same, by another way?", abort=True, err=True)
    return found
