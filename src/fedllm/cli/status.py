"""`fedllm status`, `pause`, `stop` and `logs`: runs between machines, at the coordinator."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson
from fedllm.errors import ConfigError

if TYPE_CHECKING:
    from fedllm.runtime.coordinator import RunStatus

Where = Annotated[
    Path, typer.Argument(metavar="RUN|PROJECT", help="A run folder, or project.yaml for all.", show_default=False)
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder at the coordinator.", show_default=False)]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")]
_LOOK_S = 1.0


def status(where: Where, *, follow: Follow = False, as_json: AsJson = False) -> None:
    """Say what a run is doing, who is waited for, since when and why, and the next command."""
    from fedllm.runtime.coordinator import runs_of
    from fedllm.runtime.coordinator import status as look

    found = [look(run) for run in (runs_of(where) if where.is_file() else [where])]
    if as_json:
        print_json({"runs": [item.to_json() for item in found]})
        return
    for item in found:
        show(item)
    if not found:
        typer.echo("no run yet; next: fedllm submit job.yaml")
    while follow and found and found[0].state in ("RUNNING", "STARTING", "WAITING"):
        time.sleep(_LOOK_S)
        if (now := look(found[0].path)) != found[0]:
            found = [now]
            show(now)


def show(item: RunStatus) -> None:
    """Print one run in a few lines.

    Args:
        item: The run.
    """
    rounds = "no round yet" if item.round is None else f"round {item.round}/{item.num_rounds} committed"
    typer.echo(f"{item.path.name}  {item.state}, {rounds}")
    if item.why:
        typer.echo(f"  why      {item.why}{f', since {item.since}' if item.since else ''}")
    for who in item.waiting:
        typer.echo(f"  waiting  {who}")
    typer.echo(f"  next     {item.next}")


def pause(run: Run) -> None:
    """Pause a run at its last committed round; `fedllm resume RUN` goes on."""
    _want(run, "pause")


def stop(run: Run) -> None:
    """Stop a run for good; what is committed stays."""
    _want(run, "stop")


def _want(run: Path, what: str) -> None:
    from fedllm.runs.control import want, wanted

    if wanted(run) is None:
        fix = "a run of one machine is paused with Ctrl-C"
        raise ConfigError("RUN_NOT_FOUND", "no run between machines is in this folder", where=str(run), fix=fix)
    want(run, "pause" if what == "pause" else "stop")
    typer.echo(f"{what} is asked for; see: fedllm status {run}")


def logs(run: Run, *, follow: Follow = False) -> None:
    """Print a run's events: rounds, parties that failed and why, starts and pauses."""
    from fedllm.runs.folder import run_identity
    from fedllm.runs.jsonl import read_rows

    run_identity(run)
    shown = 0
    while True:
        rows = read_rows(run / "events.jsonl")
        for row in rows[shown:]:
            parts = (
                f"round {row['round']}" if row["round"] is not None else "",
                row["party"],
                row["code"],
                row["detail"],
            )
            typer.echo("  ".join([row["time"], row["event"], *(part for part in parts if part)]))
        shown = len(rows)
        if not follow:
            return
        time.sleep(_LOOK_S)
