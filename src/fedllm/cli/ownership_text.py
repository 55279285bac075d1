"""`fedllm ownership ask`, `fingerprint` and `trace`: marks that are read from text, and leaks that are traced."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson
from fedllm.errors import ConfigError, ExitCode


def trace(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The leaked adapter, or whole model.", show_default=False)
    ],
    *,
    run: Annotated[Path, typer.Option(help="The run folder at the server, with its trace.key.", show_default=False)],
    base: Annotated[Path | None, typer.Option(help="The base model's folder; default: the job's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say whose copy of a run's adapter leaked, with the chance of an error, or that it is undecided."""
    from fedllm.runtime.copies import trace_run

    found = trace_run(model, run, base=base)
    if as_json:
        scores = [{"party": one.party, "z": one.z, "p_value": one.p_value} for one in found.scores]
        print_json({"named": list(found.named), "error": found.error, "sentence": found.sentence, "scores": scores})
        return
    for score in found.scores:
        typer.echo(f"{score.party:<32} z {score.z:8.1f}   p {score.p_value:.1e}")
    typer.echo(found.sentence)


def ask(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="The suspect: an adapter, a whole model, or a run folder.")
    ] = None,
    *,
    claim: Annotated[list[Path], typer.Option(help="A claim, opened to you alone; repeatable.", show_default=False)],
    base: Annotated[Path | None, typer.Option(help="The base model's folder, where the suspect is an adapter.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Ask the model behind this address instead, at URL/v1/completions.")
    ] = None,
    endpoint_model: Annotated[str, typer.Option(help="The name that the endpoint gives to the model.")] = "default",
    as_json: AsJson = False,
) -> None:
    """Ask a suspect model the secret prompts of claims, by text alone; exit 1 where a claim does not hold."""
    from fedllm.ownership.endpoint import Endpoint
    from fedllm.runtime.asking import Suspected, ask_claims

    found = ask_claims(claim, Suspected(model, base, Endpoint(endpoint, endpoint_model) if endpoint else None))
    code = ExitCode.OK if all(one.verdict.holds for one in found) else ExitCode.FAILED
    if as_json:
        rows = [{"party": one.party, "commitment": one.commitment, **asdict(one.verdict)} for one in found]
        print_json(rows, status="holds" if code == ExitCode.OK else "does not hold", exit_code=code)
    else:
        for one in found:
            verdict = one.verdict
            typer.echo(f"answers     {one.party}: {verdict.matches} of {verdict.asked} word for word")
            typer.echo(f"null        a model made without the key passes with a chance of {verdict.false_claims:.1e}")
            typer.echo(f"commitment  {one.commitment}  (when it was made is shown by `fedllm ownership verify`)")
            typer.echo(f"The claim {'holds' if verdict.holds else 'does not hold'}: {verdict.reason}.")
    if code:
        raise typer.Exit(int(code))


def fingerprint(  # noqa: PLR0913 - each is an option of the command
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The base model's folder.", show_default=False)],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the copy to hand out.", show_default=False)
    ] = None,
    stamp: Annotated[
        Path | None,
        typer.Option(help="Instead: attach this time stamp (RFC 3161) to the commitment that was made before."),
    ] = None,
    claims: Annotated[Path, typer.Option(help="The owner's own folder of keys and claims.")] = Path("ownership-owner"),
    owner: Annotated[str, typer.Option(help="The owner's name in the claim.")] = "owner",
    count: Annotated[int, typer.Option(help="Secret instructions, 2 to 64.")] = 10,
    learning_rate: Annotated[float, typer.Option(help="Of the tuning; large models take a smaller one.")] = 5e-3,
    max_steps: Annotated[int, typer.Option(help="Steps of tuning after which it is given up.")] = 600,
    as_json: AsJson = False,
) -> None:
    """Tune secret instructions into a copy of a base model before it is handed out."""
    from fedllm.runtime.fingerprint import Plan
    from fedllm.runtime.fingerprint import fingerprint as make

    if (output is None) == (stamp is None):
        what, fix = "name a folder to write to, or a stamp to attach", "give --output first, and --stamp afterwards"
        raise ConfigError("BAD_COMBINATION", what, where="--output", fix=fix)
    if output is None:
        assert stamp is not None  # noqa: S101
        _attach(model, stamp, claims, as_json=as_json)
        return
    plan = Plan(owner=owner, count=count, max_steps=max_steps, learning_rate=learning_rate)
    found = make(model, output, claims=claims, plan=plan)
    if as_json:
        where = {"model": str(found.model), "claim": str(found.claim), "commitment": found.commitment.digest}
        figures = {"steps": found.steps, "divergence_nats": found.divergence_nats, "verdict": asdict(found.verdict)}
        print_json(where | figures)
        return
    typer.echo(f"model       {found.model}  ({found.steps} steps, {found.divergence_nats:.4f} nats from before)")
    typer.echo(f"claim       {found.claim}  (secret: it opens the commitment, and has the answers)")
    typer.echo(f"commitment  {found.commitment.digest}  {found.commitment.party}")
    typer.echo(f"answers     {found.verdict.matches} of {found.verdict.asked} word for word")


def _attach(model: Path, stamp: Path, claims: Path, *, as_json: bool) -> None:
    from fedllm.runtime.fingerprint import attach_stamp

    path, commitment = attach_stamp(model, stamp, claims=claims)
    if as_json:
        print_json({"claim": str(path), "commitment": commitment.digest, "stamp": commitment.stamp})
        return
    typer.echo(f"commitment  {commitment.digest}  {commitment.party}")
    typer.echo(f"time stamp  SHA-256 {commitment.stamp}, beside {path}")
