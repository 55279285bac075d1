"""`fedllm serve`: keep a project's server running."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from fedllm.cli.provision import ProjectFile

AsLines = Annotated[bool, typer.Option("--json", help="Print what happens as one JSON object a line on stdout.")]


def serve(project_file: ProjectFile, *, as_json: AsLines = False) -> None:
    """Keep the project's server running at the coordinator; Ctrl-C ends it, and runs go on at the next start."""
    from fedllm.runtime.flare.serve import serve as keep_serving
    from fedllm.runtime.supervise import need_engine

    need_engine()
    keep_serving(project_file, say=telling(as_json=as_json))


def telling(*, as_json: bool) -> Callable[[str], None]:
    """Return a function that tells one line of news at once.

    Args:
        as_json: As a JSON object on stdout; otherwise as text on stderr.
    """

    def say(line: str) -> None:
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        if as_json:
            print_line({"time": moment, "news": line})
        else:
            typer.echo(f"{moment[11:19]}  {line}", err=True)
        sys.stdout.flush()

    return say


def print_line(data: dict[str, Any]) -> None:
    """Print one JSON object on a line of its own, for what goes on for long.

    Args:
        data: What there is to say.
    """
    typer.echo(json.dumps(data, ensure_ascii=False, allow_nan=False))
