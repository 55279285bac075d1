"""`fedllm verify`: is a finished run as it was left?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.cli.resume import RunArgument
from fedllm.cli.run import AsJson
from fedllm.errors import ExitCode, StateLost

if TYPE_CHECKING:
    from fedllm.runs.verify import Verified


def verify(
    run: RunArgument,
    *,
    site: Annotated[
        Path | None, typer.Option(help="A site's folder, whose kit has the certificate of the server that signed.")
    ] = None,
    peer: Annotated[
        list[Path] | None, typer.Option(help="Another site's audit log, which noted heads of this one; repeatable.")
    ] = None,
    seal: Annotated[str, typer.Option(help="The seal that was noted when the run was finished.")] = "",
    as_json: AsJson = False,
) -> None:
    """Check digests, signatures, job, journal, metrics, model card and logs of a finished run; exit 8 if altered."""
    from fedllm.runs.verify import verify_run

    found = verify_run(run, site=site, peers=peer or [], seal=seal)
    error = _error(found)
    if as_json:
        shown = {"code": error.code, "what": error.what, "where": error.where, "fix": error.fix} if error else None
        data = {"run": str(run), "seal": found.seal, "checks": [asdict(check) for check in found.checks]}
        code = error.exit_code if error else ExitCode.OK
        print_json(data | {"error": shown}, status="altered" if error else "ok", exit_code=code)
        if error:
            raise typer.Exit(int(code))
        return
    _print(found)
    if error:
        raise error


def _print(found: Verified) -> None:
    for check in found.checks:
        verdict = "ALTERED" if check.problems else "ok" if check.said else "-"
        said = "" if check.problems else check.said or "nothing to check"
        typer.echo(f"{verdict:<8} {check.name:<12} {said}".rstrip())
        for problem in check.problems:
            typer.echo(f"           {problem.file}: {problem.what}")
    typer.echo(f"seal     {found.seal or 'none'}")


def _error(found: Verified) -> StateLost | None:
    if not found.problems:
        return None
    files = list(dict.fromkeys(problem.file for problem in found.problems))
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return StateLost(
        "RUN_ALTERED",
        f"not as the run left it: {', '.join(files[:3])}{more}",
        where=str(found.path),
        fix="take the folder from a backup, or from who ran it; do not rely on its figures or its adapter",
    )
