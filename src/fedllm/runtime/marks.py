"""Where a job's marks sit, and what a claimant adds to its training."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm.errors import ConfigError, ModelError
from fedllm.job.job import Job
from fedllm.models.adapter import TunableModel
from fedllm.ownership.claims import Claim, MarkSite, new_bits, new_secret
from fedllm.ownership.directions import directed
from fedllm.ownership.log import broken, read_log
from fedllm.ownership.marks import Mark, mark_sites, num_free
from fedllm.ownership.triggers import make_triggers
from fedllm.train.corrections import Correction

if TYPE_CHECKING:
    from fedllm.ownership.commitments import ClaimFolder
    from fedllm.runtime.site import Site


def new_claim(job: Job, party: str, *, base_digest: str, sites: tuple[MarkSite, ...]) -> Claim:
    """Return a claim with a key, bits and salt that were never used before.

    Args:
        job: The job.
        party: The claimant.
        base_digest: Digest of the base model.
        sites: Where the carrier sits.
    """
    settings, key_seed = job.ownership, new_secret()
    return Claim(
        party=party,
        job_digest=job.digest,
        base_digest=base_digest,
        carrier=settings.carrier,
        sites=sites,
        key_seed=key_seed,
        bits=new_bits(settings.num_bits if settings.carrier != "none" else 0),
        triggers=make_triggers(key_seed, settings.num_triggers),
        threshold=settings.threshold,
        salt=new_secret(),
    )


def sites_of(job: Job, tunable: TunableModel) -> tuple[MarkSite, ...]:
    """Return where the bits of a job's claimants sit, once there is room for all of them.

    Args:
        job: The job.
        tunable: The model with its tuning method; a skeleton will do.

    Raises:
        ConfigError: `BAD_COMBINATION`, there is no such carrier in what is trained, or it is too small (E22).
    """
    settings = job.ownership
    if settings.carrier == "none":
        return ()
    sites, free = mark_sites(tunable, settings.carrier), capacity(job, tunable)
    asked = len(settings.claimants) * settings.num_bits
    if asked > free:
        what = f"{asked} bits of {len(settings.claimants)} claimants do not fit into {free} numbers (E22)"
        if not sites:
            what = f"nothing that is trained is a carrier of the kind `{settings.carrier}` (E22)"
        fix = "lower `num_bits`, take another carrier, or train more: a higher rank, or norms in `peft.modules_to_save`"
        where = job.origins.get("ownership.num_bits", "ownership.num_bits")
        raise ConfigError("BAD_COMBINATION", what, where=where, fix=fix)
    return sites


def capacity(job: Job, tunable: TunableModel) -> int:
    """Return how many bits the job's carrier has room for, of all claimants together.

    Args:
        job: The job.
        tunable: The model with its tuning method; a skeleton will do.
    """
    carrier = job.ownership.carrier
    rank = (job.peft.r or 0) if carrier == "product" else 0
    only_b = getattr(job.federation, "lora_rule", "") == "FFA-LoRA"
    return num_free(mark_sites(tunable, carrier), rank=rank, only_b=only_b)


def pull_of(site: Site, party: str, folder: ClaimFolder, copy: Path) -> Correction | None:
    """Return what a claimant adds to the gradient of each of its steps; None where the job has no carrier.

    Where the bits are follows from the log, which all parties sign before the first step.

    Args:
        site: What the process shares.
        party: The claimant.
        folder: Its folder of claims.
        copy: Its copy of the log of commitments.

    Raises:
        ConfigError: `OWNERSHIP_UNCOMMITTED`.
        IdentityError: The claim, or the commitment, was changed, or others can read it.
        ModelError: `MODEL_MISMATCH`, the claim is on another base model.
    """
    job = site.job
    folder.commitment(job.digest)
    claim = folder.claim(job.digest)
    if claim.base_digest != site.base.digest or claim.sites != sites_of(job, site.model):
        raise ModelError(
            "MODEL_MISMATCH",
            "the party's claim is on another base model than the run's",
            where=f"party {party}",
            fix="give the party the base model that it committed to, or commit again under another job",
        )
    if job.ownership.carrier == "none":
        return None

    @cache
    def pull() -> Correction:
        known = directed(claim, read_log(copy))
        if known is None:
            raise broken("it does not say where the bits of the party's claim are", copy)
        return Mark(known, site.model, site.model.initial(job.seed)).pull(job.ownership)

    return lambda rate: pull()(rate)
