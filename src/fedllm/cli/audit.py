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
Texts = Annotated[
    int | None,
    typer.Option(
        "--texts",
        min=0,
        help="Of a job: how many texts are tried for an update whose words cannot be read off it. Default: 20000.",
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option("--adapter", help="With --party: judge this delivered adapter of the job, and run nothing."),
]
PartyFile = Annotated[Path | None, typer.Option("--party", help="With --adapter: the site's own party file.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Of a job: the run folder. Default: runs/NAME-DIGEST-audit.")
]


def audit(  # noqa: PLR0913 - each is an option of the command
    target: Target,
    *,
    canaries: Canaries = None,
    copies: Copies = None,
    texts: Texts = None,
    overrides: Overrides = None,
    adapter: Adapter = None,
    party: PartyFile = None,
    output: Output = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Attack a run as an outsider would, and bound from below how much privacy it lost.

    Of a run: whether its adapter gives away which examples it was trained on. Of a job: canaries are planted among
    the parties' examples, the job is run, and the lower bound of epsilon stands beside the epsilon that is claimed; and
    of the updates that the server gets it is tried which words can be read off them.
    """
    from fedllm.job.job import Job
    from fedllm.runtime.audit import audit_adapter, audit_job, audit_run

    of_a_run = {"--canaries": canaries, "--copies": copies, "--texts": texts, "--output": output}
    if target.is_dir():
        _refuse(of_a_run | {"--set": overrides, "--adapter": adapter, "--party": party}, "a run, which is over")
        with live_view(quiet=quiet) as watch:
            found = audit_run(target, watch=watch)
    elif adapter is not None or party is not None:
        _refuse(of_a_run, "an adapter, which is there already")
        if adapter is None or party is None:
            raise ConfigError("MISSING_KEY", "`--adapter` and `--party` go together", fix="name both, or none of them")
        found = audit_adapter(Job.from_yaml(target, overrides=overrides), adapter, party=party)
    else:
        job = Job.from_yaml(target, overrides=overrides)
        with live_view(quiet=quiet) as watch:
            given = {"canaries": canaries, "copies": copies, "texts": texts}
            options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
            found = audit_job(job, **options, output=output, watch=watch)
    code = ExitCode.BUDGET if found.refutes_claim else ExitCode.OK
    if as_json:
        print_json(found.values(), status="refuted" if code else "ok", exit_code=code)
    else:
        _show(found)
    if code:
        raise typer.Exit(int(code))


def _refuse(given: dict[str, Any], what: str) -> None:
    if names := [name for name, value in given.items() if value is not None]:
        raise ConfigError(
            "BAD_COMBINATION",
            f"{names[0]} has no effect on {what}",
            where=names[0],
            fix="leave it out, or name a job file alone",
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
    if found.updates:
        out.print(_updates_table(found.updates))
    if found.canaries:
        for line in _canary_lines(found.canaries):
            typer.echo(line)
    else:
        typer.echo("canaries  none were planted; `fedllm audit job.yaml` plants some")
    if (found.run / "audit.json").is_file():
        typer.echo(f"audit     {found.run / 'audit.json'}")


def _updates_table(rows: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table("round", "update of", "attack", box=box.SIMPLE_HEAD, title="words in updates", title_justify="left")
    for title in ("words", "of", "by chance", "right", "AUC", "of noise"):
        table.add_column(title, justify="right")
    for row in rows:
        counts = [str(row["words"]), str(row["among"])]
        rates = ["-" if row[key] is None else f"{row[key]:.0%}" for key in ("by_chance", "found")]
        ranked = ["-" if row[key] is None else f"{row[key]:.2f}" for key in ("auc", "auc_of_noise")]
        table.add_row(str(row["round"]), row["whose"], row["attack"], *counts, *rates, *ranked)
    return table


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
