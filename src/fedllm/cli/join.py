"""`fedllm join`: keep a party's site running."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.serve import AsLines, telling

PartyFile = Annotated[Path, typer.Argument(help="This site's own party file.", show_default=False)]
Site = Annotated[Path | None, typer.Option("--site", help="The site's folder. Default: site-NAME beside the file.")]


def join(party_file: PartyFile, *, site: Site = None, as_json: AsLines = False) -> None:
    """Keep this party's site running: it connects to the server and answers approved jobs, until Ctrl-C."""
    from fedllm.runtime.flare.serve import join as keep_joined
    from fedllm.runtime.supervise import need_engine

    need_engine()
    keep_joined(party_file, site=site, say=telling(as_json=as_json))
