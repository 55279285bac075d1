"""`fedllm init`: a new job folder that runs as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson

Recipe = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="What the job is about: fedavg (one adapter, tuned together), ownership (the same, and whose it is can be "
        "shown), offsite (the owner keeps its model).",
    ),
]


def init(
    folder: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    *,
    recipe: Recipe = "fedavg",
    as_json: AsJson = False,
) -> None:
    """Write a commented job, a file per party, sample data and a small base model that run as they are."""
    from fedllm.runtime.scaffold import FIRST, write_job_folder

    job = write_job_folder(folder, recipe)
    if as_json:
        print_json({"job": str(job)})
        return
    typer.echo(f"job      {job}\nparties  {folder / 'parties'}\ndata     {folder / 'data'}")
    first = FIRST.get(recipe, "fedllm validate {job}").format(job=job)
    typer.echo(f"next     {first} && fedllm run {job}")
