"""`fedllm schema`: the JSON Schema of job.yaml, party.yaml or project.yaml."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer


class Kind(StrEnum):
    """Which file."""

    job = "job"
    party = "party"
    project = "project"


def schema(kind: Annotated[Kind, typer.Argument(help="Which file.")] = Kind.job) -> None:
    """Print the JSON Schema of job.yaml, party.yaml or project.yaml, for editors."""
    from fedllm.job.schema import json_schema

    typer.echo(json.dumps(json_schema(kind.value), indent=2, ensure_ascii=False))
