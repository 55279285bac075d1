"""`fedllm ownership`: commit to a claim on a model before a run, and verify claims on a suspect model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.cli.run import AsJson, JobFile, Overrides
from fedllm.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from fedllm.ownership.verify import Verdict

app = typer.Typer(help="Claim a model that was tuned together, and verify claims.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Claim a model that was tuned together, and verify claims."""


@app.command()
def commit(
    job_file: JobFile,
    *,
    party: Annotated[
        Path | None, typer.Option(help="The party's own file. Default: all claimants' files beside the job.")
    ] = None,
    stamp: Annotated[
        Path | None, typer.Option(help="Attach this time stamp (RFC 3161) to the commitment that was made before.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Make a secret claim on a job's model, and the signed commitment to it; before the run."""
    from fedllm.job.job import Job, load_parties, load_party
    from fedllm.ownership.keys import fingerprint
    from fedllm.runtime.ownership import commit as commit_claims

    job = Job.from_yaml(job_file, overrides=overrides)
    parties = [load_party(party)] if party else load_parties(job)
    found = commit_claims(job, parties, stamp=stamp)
    if as_json:
        print_json([{"claim": str(path), **commitment.model_dump(mode="json")} for path, commitment in found])
        return
    for path, commitment in found:
        typer.echo(f"claim       {path}  (secret: it opens the commitment, and finds the mark)")
        typer.echo(f"commitment  {commitment.digest}  {commitment.party}, job {job.digest[:16]}")
        typer.echo(f"key         {fingerprint(commitment.public_key)}")


@app.command()
def verify(  # noqa: PLR0913 - each is an option of the command
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="The suspect: an adapter, a whole model, or a run folder.")
    ] = None,
    *,
    claim: Annotated[
        list[Path],
        typer.Option(help="A claim, opened to you alone, or the folder with it; repeatable.", show_default=False),
    ],
    log: Annotated[
        list[Path] | None, typer.Option(help="The log of commitments, or its run folder: one for all, or one a claim.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The base model, which a whole model is read against.")] = None,
    seen: Annotated[
        str | None, typer.Option(help="When the suspect was first seen: 2026-05-31. Commitments must be older.")
    ] = None,
    party_key: Annotated[
        list[str] | None, typer.Option(help="NAME=sha256:..., a key that you know by other ways; repeatable.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Ask triggers of the model behind this address, at URL/v1/completions.")
    ] = None,
    endpoint_model: Annotated[str, typer.Option(help="The name that the endpoint gives to the model.")] = "default",
    tsa_certificate: Annotated[
        list[Path] | None,
        typer.Option(help="A time stamping authority's certificate (PEM), to verify stamps with; repeatable."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Largest p-value that holds, after correction; a claim's own may be stricter.")
    ] = 1e-6,
    as_json: AsJson = False,
) -> None:
    """Verify claims on a suspect model; exit 1 where one does not hold."""
    from fedllm.ownership.disputes import parse_date
    from fedllm.ownership.endpoint import Endpoint
    from fedllm.runtime.ownership import Evidence
    from fedllm.runtime.ownership import verify as verify_claims

    when = parse_date(seen) if seen else None
    asked = Endpoint(endpoint, endpoint_model) if endpoint else None
    evidence = Evidence(claim, log or (), base, when, _keys(party_key or []), asked, tsa_certificate or (), threshold)
    verdicts = verify_claims(model, evidence)
    code = ExitCode.OK if all(verdict.upheld for verdict in verdicts) else ExitCode.FAILED
    if as_json:
        status = "upheld" if code == ExitCode.OK else "not upheld"
        print_json([asdict(verdict) for verdict in verdicts], status=status, exit_code=code)
    else:
        for verdict in verdicts:
            _show(verdict)
    if code:
        raise typer.Exit(int(code))


def _keys(given: list[str]) -> dict[str, str]:
    found = dict(text.split("=", 1) for text in given if "=" in text)
    if len(found) < len(given):
        raise ConfigError(
            "BAD_VALUE", "a party is given no key, or twice", where="--party-key", fix="write NAME=sha256:..."
        )
    return found


def _show(verdict: Verdict) -> None:
    for reading in verdict.readings:
        line = f"{reading.matches} of {reading.num_bits} {reading.unit}, p = {reading.p:.2g}"
        typer.echo(f"mark        {verdict.party}: {line} ({reading.carrier}, {reading.way})")
    if verdict.place:
        place = verdict.place
        typer.echo(f"commitment  entry {place.index} of {place.size}, before {place.time}")
        typer.echo(f"signed by   {', '.join(place.signers)}; the key of {verdict.party} is {place.key}")
        if place.stamp:
            chain = f"of {place.stamp_time}" if place.stamp_time else "its chain was NOT verified"
            typer.echo(f"time stamp  SHA-256 {place.stamp}; {chain}")
    elif verdict.stamp_time:
        typer.echo(f"time stamp  of {verdict.stamp_time}, in the place of a log")
    typer.echo(verdict.sentence)
