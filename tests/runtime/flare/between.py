"""A job between machines that are threads: kits, approvals and signed messages as in earnest, and no sockets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fake_channel import Air, net
from tiny import TinyFederation

from fedllm.identity.files import KEY_FILE
from fedllm.identity.keys import load_key
from fedllm.identity.kit import open_kit
from fedllm.identity.signing import Signer
from fedllm.job.approval import approve
from fedllm.job.job import load_party
from fedllm.job.project import Project
from fedllm.runs.folder import RunFolder
from fedllm.runs.jsonl import write_json
from fedllm.runs.plan_files import write_plan
from fedllm.runtime.flare.desk import Desk
from fedllm.runtime.flare.party import open_party
from fedllm.runtime.flare.seal import seal_of
from fedllm.runtime.provision import provision_all
from fedllm.runtime.run import RunResult, carry_out


def make_kits(root: Path, parties: Sequence[str]) -> Path:
    """Return a folder with the sites of a project, to be copied for each test.

    Args:
        root: An empty folder.
        parties: Who takes part.
    """
    server = {"host": "127.0.0.1", "port": 1}
    project = Project.model_validate({"name": "trial", "server": server, "parties": list(parties)})
    provision_all(root / "coordinator", project, {name: root / f"site-{name}" for name in parties})
    return root


def site_of(made: TinyFederation, name: str) -> Path:
    """Return the site of a party, with its approval of the job.

    Args:
        made: The job, with the project's sites in a folder `sites` beside it.
        name: The party.
    """
    site = made.folder.parent / "sites" / f"site-{name}"
    file = made.folder / "parties" / f"{name}.yaml"
    signer = Signer(load_key(site / KEY_FILE))
    approve(made.job(), load_party(file).party, signer=signer, folder=site, project="trial")
    (site / "state").mkdir(exist_ok=True)
    write_json(site / "state" / "site.json", {"party_file": str(file)})
    return site


def run_between(made: TinyFederation, name: str = "run", *, air: Air | None = None) -> RunResult:
    """Return the result of the job between a server and sites that know only what they are told.

    Args:
        made: As for `site_of`. The server has the job, and nothing else of its folder.
        name: The run's name.
        air: What lies between the machines.
    """
    job = made.job()
    (made.folder / "coordinator").mkdir(exist_ok=True)
    away = job.located(made.folder / "coordinator")
    kit = open_kit(made.folder.parent / "sites" / "coordinator" / "site")
    path = made.folder / name
    run = RunFolder.create(path, job_digest=job.digest)
    write_plan(run, away, [])
    asked = job.model_dump(mode="json")

    def opener(party: str) -> Callable[[Desk], Any]:
        return lambda desk: open_party(site_of(made, party), asked, run.run_id, desk)

    try:
        with net(path, {party: opener(party) for party in job.parties}, air=air, seal=seal_of(kit)) as met:
            return carry_out(run, away, [], met.link)
    finally:
        run.close()
