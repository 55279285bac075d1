"""`fedllm audit-log`: verify or show what a site noted."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson
from fedllm.errors import ExitCode

if TYPE_CHECKING:
    from fedllm.runs.audit_log import Entry
    from fedllm.runs.audit_verify import Verdict

app = typer.Typer(help="Verify or show a site's audit log.", no_args_is_help=True)
LogFile = Annotated[Path, typer.Argument(help="The log, such as site-NAME/audit.jsonl.", show_default=False)]
_PROBLEMS_SHOWN = 50


@app.callback()
def _group() -> None:
    """Verify or show a site's audit log."""


@app.command()
def verify(
    file: LogFile,
    *,
    peer: Annotated[
        list[Path] | None, typer.Option(help="Another site's log, which noted heads of this one; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that each line is the one that was written and that none is missing; exit 8 where one is not."""
    from fedllm.runs.audit_verify import examine_log

    verdict = examine_log(file, peer or [])
    code = ExitCode.STATE_LOST if verdict.problems else ExitCode.OK
    if as_json:
        status = "broken" if code else "ok"
        print_json(
            {"file": str(file), "peers": [str(path) for path in peer or []], **asdict(verdict)},
            status=status,
            exit_code=code,
        )
    else:
        _print_verdict(file, verdict)
    if code:
        raise typer.Exit(int(code))


def _print_verdict(file: Path, verdict: Verdict) -> None:
    for problem in verdict.problems[:_PROBLEMS_SHOWN]:
        place = problem.file if problem.line is None else f"{problem.file}:{problem.line}"
        typer.echo(f"{place}: {problem.kind}: {problem.what}")
    if verdict.problems:
        more = len(verdict.problems) - _PROBLEMS_SHOWN
        typer.echo(f"{file}: broken, {len(verdict.problems)} problems" + (f", {more} not shown" if more > 0 else ""))
        return
    typer.echo(f"{file}: whole, {verdict.lines} lines of {verdict.actor}")
    if verdict.vouched is None:
        typer.echo("  a cut at its end, or a log written anew, shows only against other sites' logs: --peer FILE")
    else:
        after = verdict.lines - 1 - verdict.vouched
        typer.echo(f"  other sites noted entry {verdict.vouched}; the {after} after it rest on this file alone")


@app.command()
def show(file: LogFile, *, as_json: AsJson = False) -> None:
    """Print the events of a log, one a line. Nothing is verified."""
    from fedllm.runs.audit_log import read_log

    lines = [(number, entry) for number, _, entry in read_log(file)]
    if as_json:
        found = [entry.model_dump() if entry else {"line": number, "unreadable": True} for number, entry in lines]
        print_json(found)
        return
    for number, entry in lines:
        typer.echo(_line(entry) if entry else f"line {number}: unreadable")


def _line(entry: Entry) -> str:
    words = [f"{entry.n:>6}  {entry.time[:19]}  {entry.event:<18}"]
    facts = entry.model_dump(exclude={"n", "time", "actor", "event", "previous", "hash"}, exclude_none=True)
    for name, value in facts.items():
        # Enough of a digest to know it by; --json has all.
        shown = f"{value[:12]}..." if isinstance(value, str) and len(value) >= 32 else value
        words.append(f"{name}={shown}")
    return " ".join(words).rstrip()
