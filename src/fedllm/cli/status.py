"""`fedllm status`, `pause`, `stop` and `logs`: what is going on between machines, and what is wanted of a run."""

from __future__ import annotations

import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedllm.cli.join import Site
from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson
from fedllm.cli.serve import print_line
from fedllm.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from fedllm.runtime.coordinator import ServerStatus
    from fedllm.runtime.site_status import SiteStatus
    from fedllm.runtime.status import RunStatus

Where = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|PROJECT|PARTY",
        help="A run folder; project.yaml for all runs at the coordinator; party.yaml for a site.",
        show_default=False,
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder at the coordinator.", show_default=False)]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until no run is under way any more.")]
FollowLog = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over, or paused.")]
_LOOK_S = 1.0
# Something is said at least so often while a run is followed.
_EVERY_S = 8.0


def status(where: Where, *, follow: Follow = False, site: Site = None, as_json: AsJson = False) -> None:
    """Say what a run or a site is doing, who is waited for, since when and why, and the next command.

    With --follow the exit code is that of the run: 0, 1 failed or stopped, 3 paused.
    """
    kind = _kind(where)
    if kind == "party":
        _party(where, site, as_json=as_json)
        return
    if kind == "project" and not follow:
        _project(where, as_json=as_json)
        return
    runs = _runs(where, kind)
    if follow:
        raise typer.Exit(int(_follow(runs, as_json=as_json)))
    (found,) = _look(runs)
    if as_json:
        print_json({"runs": [found.to_json()]})
    else:
        show(found)


def _kind(where: Path) -> Literal["run", "project", "party"]:
    from fedllm.job.yaml_file import read_yaml

    if where.is_dir():
        return "run"
    fix = "name a run folder, the project.yaml of a coordinator, or the party.yaml of a site"
    if not where.exists():
        raise ConfigError("FILE_NOT_FOUND", "there is no such file or folder", where=str(where), fix=fix)
    keys = set(read_yaml(where).values)
    if "server" in keys:
        return "project"
    if "data" in keys and "train" not in keys:
        return "party"
    raise ConfigError("RUN_NOT_FOUND", "the file is no project and no party", where=str(where), fix=fix)


def _runs(where: Path, kind: str) -> list[Path]:
    from fedllm.runtime.coordinator import runs_of

    return runs_of(where) if kind == "project" else [where]


def _look(runs: list[Path]) -> list[RunStatus]:
    from fedllm.runtime.status import run_status

    return [run_status(run) for run in runs]


def _project(where: Path, *, as_json: bool) -> None:
    from fedllm.runtime.coordinator import server_status

    server, found = server_status(where), _look(_runs(where, "project"))
    if as_json:
        print_json({"server": server.to_json(), "runs": [item.to_json() for item in found]})
        return
    _show_server(server)
    for item in found:
        show(item)
    if not found:
        typer.echo("no run yet; next: fedllm submit job.yaml")


def _show_server(server: ServerStatus) -> None:
    typer.echo(f"server  {server.state}{_since(server.since)}")
    if server.connected:
        typer.echo(f"  here     {', '.join(server.connected)}")
    if server.missing:
        typer.echo(f"  waiting  {', '.join(server.missing)}: not connected")
    typer.echo(f"  next     {server.next}")


def show(item: RunStatus) -> None:
    """Print one run in a few lines.

    Args:
        item: The run.
    """
    rounds = "no round yet" if item.round is None else f"round {item.round}/{item.num_rounds} committed"
    typer.echo(f"{item.path.name}  {item.state}, {rounds}")
    typer.echo(f"  why      {item.why}{_since(item.since)}")
    for line in _waiting(item):
        typer.echo(f"  waiting  {line}")
    typer.echo(f"  next     {item.next}")


def _waiting(item: RunStatus) -> list[str]:
    """Return a line for all who are waited for with the same reason since the same moment."""
    alike: dict[str, list[str]] = {}
    for who in item.waiting:
        alike.setdefault(f"{who.why}{_since(who.since)}", []).append(who.who)
    return [f"{', '.join(names)}: {rest}" for rest, names in alike.items()]


def _party(where: Path, site: Path | None, *, as_json: bool) -> None:
    from fedllm.runtime.site_status import site_status

    found = site_status(where, site=site)
    if as_json:
        print_json(found.to_json())
        return
    _show_site(found)


def _show_site(found: SiteStatus) -> None:
    typer.echo(f"{found.party}  {found.state}, project {found.project}, server {found.server}{_since(found.since)}")
    if found.why:
        typer.echo(f"  why      {found.why}")
    for run in found.runs:
        typer.echo(f"  run      {run.job or 'job unknown'} ({run.run_id[:8]}): {run.stage}{_since(run.since)}")
    if not found.runs:
        typer.echo("  run      none yet")
    typer.echo(f"  next     {found.next}")


def _since(moment: str) -> str:
    """Return `, since 12:30:05 UTC (7 s)`; with the date where it is not today."""
    if not moment:
        return ""
    then, now = datetime.fromisoformat(moment), datetime.now(UTC)
    clock = then.strftime("%H:%M:%S" if then.date() == now.date() else "%Y-%m-%d %H:%M:%S")
    return f", since {clock} UTC ({_spent((now - then).total_seconds())})"


def _spent(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _follow(runs: list[Path], *, as_json: bool) -> ExitCode:
    """Print what is new, and at least a line every few seconds; return the exit code of the worst."""
    said: dict[Path, tuple[Any, float]] = {}
    while True:
        found = _look(runs)
        for item in found:
            before, when = said.get(item.path, (None, 0.0))
            is_new = before != (key := _matter(item))
            if is_new or (item.goes_on and time.monotonic() - when >= _EVERY_S):
                said[item.path] = key, time.monotonic()
                _tell(item, is_new=is_new, as_json=as_json)
        if not any(item.goes_on for item in found):
            return max((item.exit_code for item in found), default=ExitCode.OK)
        time.sleep(_LOOK_S)


def _matter(item: RunStatus) -> tuple[Any, ...]:
    # That parties load, train and answer one after the other is no news; that one falls silent is.
    if item.state == "RUNNING":
        return item.state, item.round, [who.who for who in item.waiting if who.why.startswith("silent")]
    # Nor is it that seconds go by.
    return item.state, item.round, re.sub(r"[\d.]+", "", item.why), [who.who for who in item.waiting]


def _tell(item: RunStatus, *, is_new: bool, as_json: bool) -> None:
    if as_json:
        print_line({"run": item.to_json()})
    elif is_new:
        show(item)
    else:
        typer.echo(f"{item.path.name}  {item.state}, {'; '.join(_waiting(item)) or item.why + _since(item.since)}")
    sys.stdout.flush()


def pause(run: Run, *, as_json: AsJson = False) -> None:
    """Pause a run at its last committed round; `fedllm resume RUN` goes on."""
    _ask(run, "pause", as_json=as_json)


def stop(run: Run, *, as_json: AsJson = False) -> None:
    """Stop a run for good: it cannot be resumed. What is committed stays; to go on later, take `pause`."""
    _ask(run, "stop", as_json=as_json)


def _ask(run: Path, asked: Literal["pause", "stop"], *, as_json: bool) -> None:
    from fedllm.runtime.coordinator import ask
    from fedllm.runtime.status import run_status

    ask(run, asked)
    found = run_status(run)
    if as_json:
        print_json({"asked": asked, "run": found.to_json()})
    else:
        show(found)


def logs(run: Run, *, follow: FollowLog = False, as_json: AsJson = False) -> None:
    """Print a run's events: rounds, parties that failed and why, starts and pauses. With --json one object a line."""
    from fedllm.runs.folder import run_identity
    from fedllm.runs.jsonl import read_rows
    from fedllm.runtime.status import run_status

    run_identity(run)
    shown = 0
    while True:
        # The state comes first: what happened before it is in the rows then.
        goes_on = follow and run_status(run).goes_on
        rows = read_rows(run / "events.jsonl")
        for row in rows[shown:]:
            print_line(row) if as_json else typer.echo(_event(row))
        sys.stdout.flush()
        shown = len(rows)
        if not goes_on:
            return
        time.sleep(_LOOK_S)


def _event(row: dict[str, Any]) -> str:
    where = f"round {row['round']}" if row["round"] is not None else ""
    return "  ".join([row["time"], row["event"], *(part for part in (where, row["party"], row["code"]) if part)]) + (
        f"  {row['detail']}" if row["detail"] else ""
    )
