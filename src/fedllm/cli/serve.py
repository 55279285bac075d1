"""`fedllm serve`: keep a project's server running."""

from __future__ import annotations

import typer

from fedllm.cli.provision import ProjectFile


def serve(project_file: ProjectFile) -> None:
    """Keep the project's server running at the coordinator; Ctrl-C ends it, and runs go on at the next start."""
    from fedllm.runtime.flare.serve import serve as keep_serving

    keep_serving(project_file, say=lambda line: typer.echo(line, err=True))
