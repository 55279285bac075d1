"""What a party's job process does, apart from FLARE: check the job, load once, answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedllm.job.job import Job, LocatedParty
from fedllm.job.loading import load_model
from fedllm.job.party import Party
from fedllm.runs.folder import attach
from fedllm.runtime.host import PartyHost
from fedllm.runtime.run import Watch, local_hosts
from fedllm.runtime.site import open_site, party_tokens


def open_party(
    site: Path, party: str, asked: dict[str, Any], run_id: str, on_step: Callable[[int, int], None]
) -> PartyHost:
    """Return a party of a run, loaded and ready to answer.

    Args:
        site: Its site folder.
        party: Its name.
        asked: The job as it came.
        run_id: The run.
        on_step: Called after each optimiser step.
    """
    job = Job.model_validate(asked)
    file = Path((site / "party.txt").read_text())
    base = Path((site / "base.txt").read_text())
    found, _ = load_model(Party, file, overrides=[])
    located = LocatedParty(party=found, base_dir=file.resolve().parent)
    job = job.located(base)
    run = attach(site / "state" / "runs" / run_id, run_id=run_id, job_digest=job.digest)
    loaded = open_site(job, [located])
    watch = Watch(on_step=lambda _, step, of: on_step(step, of))
    return local_hosts(loaded, {party: party_tokens(loaded, located)}, run, watch=watch)[party]
