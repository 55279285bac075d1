"""`fedllm up`: a job with real processes and mutual TLS on one machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.live import live_view
from fedllm.cli.run import AsJson, JobFile, Overrides, Quiet, show_result
from fedllm.errors import FedllmError

Folder = Annotated[
    Path | None, typer.Option("--output", "-o", help="Keys, kits, states and the run. Default: up/NAME-DIGEST.")
]


def up(
    job_file: JobFile,
    *,
    overrides: Overrides = None,
    output: Folder = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a job as between machines, with a server and a client per party on this one; again to go on."""
    with live_view(quiet=quiet) as watch:
        from fedllm.job.job import Job
        from fedllm.runtime.up import up as run_up

        try:
            result = run_up(Job.from_yaml(job_file, overrides=overrides), folder=output, watch=watch)
        except FedllmError:
            raise
        except BaseException as stop:
            stop.add_note("go on with the same command: fedllm " + shlex.join(sys.argv[1:]))
            raise
    show_result(result, as_json=as_json)
