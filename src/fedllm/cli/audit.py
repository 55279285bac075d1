"""`fedllm audit`: what a run, or a job, gives away of the data that it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.cli.live import live_view
from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson, Overrides, Quiet
from fedllm.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from fedllm.runtime.audit import Audit

Target = Annotated[
    Path,
    typer.Argument(
        metavar="JOB_OR_RUN", help="The folder of a finished run, or a job file, which is run.", show_default=False
    ),
]
Canaries = Annotated[
    int | None,
    typer.Option(
        "--canaries",
        min=20,
        help="Of a job: random examples, each planted by a fair coin, of all parties together. Default: 200.",
    ),
]
Copies = Annotated[int | None, typer.Option("--copies", min=1, help="Of a job: how often each is planted. Default: 1.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Of a job: the run folder. Default: runs/NAME-DIGEST-audit.")
]


def audit(  # noqa: PLR0913 - each is an option of the command
    target: Target,
    *,
    canaries: Canaries = None,
    copies: Copies = None,
    overrides: Overrides = None,
    output: Output = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Attack a run as an outsider would, and bound from below how much privacy it lost.

    Of a run: whether its adapter gives away which examples it was trained on. Of a job: canaries are planted among
    the parties' examples, the job is run, and the lower bound of epsilon stands beside the epsilon that is claimed.
    """
    from fedllm.runtime.audit import audit_job, audit_run

    if target.is_dir():
        given = {"--canaries": canaries, "--copies": copies, "--output": output, "--set": overrides}
        _refuse([name for name, value in given.items() if value])
        with live_view(quiet=quiet) as watch:
            found = audit_run(target, watch=watch)
    else:
        from fedllm.job.job import Job

        job = Job.from_yaml(target, overrides=overrides)
        with live_view(quiet=quiet) as watch:
            found = audit_job(job, canaries=canaries or 200, copies=copies or 1, output=output, watch=watch)
    code = ExitCode.BUDGET if found.refutes_claim else ExitCode.OK
    if as_json:
        print_json(found.values(), status="refuted" if code else "ok", exit_code=code)
    else:
        _show(found)
    if code:
        raise typer.Exit(int(code))


def _refuse(names: list[str]) -> None:
    if names:
        raise ConfigError(
            "BAD_COMBINATION",
            f"{names[0]} has no effect on a run, which is over",
            where=names[0],
            fix="name a job file, or leave it out",
        )


def _show(found: Audit) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    if found.membership:
        table = Table("party", box=box.SIMPLE_HEAD, title="membership inference", title_justify="left")
        for title in ("members", "non-members", "AUC", "+-", "found at 1 % false"):
            table.add_column(title, justify="right")
        for row in found.membership:
            rate = row["tpr_at_1_fpr"]
            cells = [str(row["members"]), str(row["non_members"]), f"{row['auc']:.3f}", f"{row['auc_error']:.3f}"]
            table.add_row(row["party"], *cells, "too few" if rate is None else f"{rate:.1%}")
        out.print(table)
    if found.canaries:
        for line in _canary_lines(found.canaries):
            typer.echo(line)
    else:
        typer.echo("canaries  none were planted; `fedllm audit job.yaml` plants some")
    typer.echo(f"audit     {found.run / 'audit.json'}")


def _canary_lines(values: dict[str, Any]) -> list[str]:
    claim, bound = values["claimed_epsilon"], values["epsilon_lower_bound"]
    times = f", {values['copies']} times each" if values["copies"] > 1 else ""
    bits = f"{values['exposure_bits_mean']:.1f} bits on average, {values['exposure_bits_max']:.1f} at most, of "
    lines = [
        f"canaries  {values['planted']} of {values['canaries']} planted{times}",
        f"exposure  {bits}{values['exposure_bits_possible']:.1f}; {values['ranked_first']} ranked first",
        f"guesses   {values['correct']} of {values['guesses']} right",
        f"epsilon   at least {bound:.3f} with {values['confidence']:.0%} confidence, delta {values['delta']:.3g}; "
        f"so many canaries can show {values['largest_possible_bound']:.3f}",
    ]
    if claim is None:
        return [*lines, "claim     none that is known here"]
    refuted = "REFUTED: more was lost than is claimed" if bound > claim else "not refuted"
    return [*lines, f"claim     epsilon {claim:.3f}: {refuted}"]
