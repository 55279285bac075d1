"""What claims and traced copies mean, in sentences: for who plans a run, and for who approves a job at a site."""

from __future__ import annotations

from collections.abc import Iterator

from fedllm.job.job import Job, LocatedParty
from fedllm.job.ownership import claim_folder
from fedllm.models.adapter import TunableModel
from fedllm.ownership.settings import OwnershipSettings
from fedllm.runtime.marks import capacity

_CARRIERS = {"product": "the product of LoRA's factors", "norms": "the scales of norms"}


def claims_foreseen(job: Job, parties: list[LocatedParty], tunable: TunableModel) -> tuple[str, ...]:
    """Return who will claim the model, with what, who has committed already, and what leaves traced; none without.

    Args:
        job: The job.
        parties: The parties of this machine.
        tunable: The model with its tuning method; a skeleton will do.
    """
    return tuple(_foreseen(job, parties, tunable))


def claims_told(job: Job, located: LocatedParty) -> tuple[str, ...]:
    """Return what claims and traced copies mean at one site, for who approves the job there; none without.

    Args:
        job: The job.
        located: The site's own file and where its paths start.
    """
    return tuple(_told(job, located))


def _foreseen(job: Job, parties: list[LocatedParty], tunable: TunableModel) -> Iterator[str]:
    settings = job.ownership
    if settings.enabled:
        yield f"{', '.join(settings.claimants)} claim the model: {' and '.join(_marks(settings))}"
        if settings.carrier != "none":
            asked, room = len(settings.claimants) * settings.num_bits, capacity(job, tunable)
            yield f"{asked} bits in all, with room for {room:,}"
    for located in parties:
        if located.party.name in settings.claimants:
            yield f"{located.party.name} {_state(job, located)}"
    if settings.trace != "none":
        yield "each party gets a copy of the adapter with a mark of its own, by which a leak is traced"
    yield from _warnings(job)


def _told(job: Job, located: LocatedParty) -> Iterator[str]:
    settings, party = job.ownership, located.party.name
    if settings.enabled:
        yield f"{', '.join(settings.claimants)} claim the model that comes out: {' and '.join(_marks(settings))}"
        yield (
            f"this site signs the log of commitments before round 0 and after each round, with the key in "
            f"{claim_folder(located).root}, and keeps a copy of the log"
        )
        yield from _own_part(job, located) if party in settings.claimants else _part_of_others(settings)
    if settings.trace != "none":
        yield (
            "this site gets a copy of the adapter that differs from the others': the server put a mark into it, and "
            "can tell from a leaked one that it was this site's"
        )
    yield from _warnings(job)


def _marks(settings: OwnershipSettings) -> Iterator[str]:
    if settings.carrier != "none":
        yield f"{settings.num_bits} secret bits each, in {_CARRIERS[settings.carrier]}"
    if settings.num_triggers:
        yield f"{settings.num_triggers} secret prompts each, to which the model will give secret answers"


def _own_part(job: Job, located: LocatedParty) -> Iterator[str]:
    yield "this site is a claimant: its training puts its own marks into the update, beside what its data teach"
    yield f"this site {_state(job, located)}"


def _part_of_others(settings: OwnershipSettings) -> Iterator[str]:
    yield "this site claims nothing: the model that it gets has the others' marks, which it cannot read"
    if settings.num_triggers:
        yield "to prompts that are not known here, the model that this site gets gives answers that others chose by lot"


def _state(job: Job, located: LocatedParty) -> str:
    is_there = claim_folder(located).commitment_file(job.digest).exists()
    return "has committed" if is_there else "has NOT committed"


def _warnings(job: Job) -> Iterator[str]:
    """Yield what noise does to marks."""
    asked, settings = job.privacy.differential_privacy, job.ownership
    if asked.unit == "none" or not settings.enabled:
        return
    verify = "verify the claims when the run is finished (W24)"
    if asked.unit == "party":
        yield f"WARNING: marks are clipped and noised with each party's update, and may be lost; {verify}"
    elif settings.num_triggers:
        yield f"WARNING: the noise of private training may keep the secret answers from being learnt; {verify}"
