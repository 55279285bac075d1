"""`fedllm resume`: go on with a run from its last committed round."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.live import console, live_view
from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson, Quiet, Workers, show_result

RunArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A folder that `fedllm run` or `fedllm submit` made.", show_default=False),
]


def resume(run: RunArgument, *, workers: Workers = 0, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Go on with a run from its last committed round; the result has the same bits as an undisturbed run."""
    from fedllm.runs.control import wanted
    from fedllm.runs.folder import last_commit

    if wanted(run) is not None:
        _go_on_between_machines(run, as_json=as_json)
        return
    from fedllm.runtime.run import resume as resume_run

    if (last := last_commit(run)) is not None and not quiet:
        console().print(f"going on after round {last}")
    with live_view(quiet=quiet) as watch:
        result = resume_run(run, num_workers=workers, watch=watch)
    show_result(result, as_json=as_json)


def _go_on_between_machines(run: Path, *, as_json: bool) -> None:
    from fedllm.cli.status import show
    from fedllm.runtime.coordinator import go_on
    from fedllm.runtime.status import run_status

    go_on(run)
    if as_json:
        print_json({"run": run_status(run).to_json()})
    else:
        show(run_status(run))
