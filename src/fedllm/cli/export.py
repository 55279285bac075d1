"""`fedllm export`: the tuned model for PEFT, transformers or a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.cli.resume import RunArgument
from fedllm.cli.run import AsJson


def export(
    run: RunArgument,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    party: Annotated[
        str | None, typer.Option("--party", help="Whose adapter, where each party has its own (FedSA-LoRA).")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the base model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Export a run's adapter, alone or merged into its base model."""
    from fedllm.runtime.export import export as export_run

    folder = export_run(run, output, merge=merge, party=party)
    loads_by = "from_pretrained of transformers" if merge else "fedllm.load_adapter"
    if as_json:
        print_json({"output": str(folder), "merged": merge})
    else:
        typer.echo(f"{folder}  (loads with {loads_by})")
