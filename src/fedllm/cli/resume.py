"""`fedllm resume`: go on with a run from its last committed round."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.live import console, live_view
from fedllm.cli.run import AsJson, Quiet, Workers, show_result

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A folder that `fedllm run` made.", show_default=False)
]


def resume(run: RunArgument, *, workers: Workers = 0, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Go on with a run from its last committed round; the result has the same bits as an undisturbed run."""
    from fedllm.runs.control import wanted
    from fedllm.runs.folder import last_commit
    from fedllm.runtime.run import resume as resume_run

    if wanted(run) is not None:
        from fedllm.cli.status import show
        from fedllm.runtime.coordinator import go_on
        from fedllm.runtime.coordinator import status as look

        go_on(run)
        show(look(run))
        return
    if (last := last_commit(run)) is not None and not quiet:
        console().print(f"going on after round {last}")
    with live_view(quiet=quiet) as watch:
        result = resume_run(run, num_workers=workers, watch=watch)
    show_result(result, as_json=as_json)
