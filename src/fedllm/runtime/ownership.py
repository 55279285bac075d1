"""Commit to claims before a run, and hand each claimant's mark to its training."""

from __future__ import annotations

from pathlib import Path

from fedllm.errors import ConfigError
from fedllm.job.check import check_job
from fedllm.job.job import Job, LocatedParty
from fedllm.job.ownership import claim_folder
from fedllm.models.adapter import TunableModel, skeleton
from fedllm.models.digest import base_digest
from fedllm.ownership.claims import Claim, MarkSite, new_bits, new_secret
from fedllm.ownership.commitments import Commitment
from fedllm.ownership.marks import mark_sites, num_free
from fedllm.runtime.site import base_folder


def commit(job: Job, parties: list[LocatedParty], *, stamp: Path | None = None) -> list[tuple[Path, Commitment]]:
    """Return each claimant's claim file and commitment; the files are written into the party's folder of claims.

    Args:
        job: The job.
        parties: Party files of this machine; those that are no claimants are passed over.
        stamp: A time stamp (RFC 3161) on the one commitment that was made before.

    Raises:
        ConfigError: The job has no claimants here, or its settings cannot hold together; `BAD_VALUE`, a stamp on
            something else.
        IdentityError: `KEY_EXISTS`, a claim on this job's model was made before.
    """
    check_job(job, parties)
    claimants = [located for located in parties if located.party.name in job.ownership.claimants]
    if not claimants:
        what = "none of these parties is a claimant of the job"
        fix = "name the party in the job's `ownership.claimants`"
        raise ConfigError("BAD_COMBINATION", what, where="ownership.claimants", fix=fix)
    if stamp is not None:
        return [_stamped(job, claimants, stamp)]
    folder, _ = base_folder(job, claimants)
    digest, sites = base_digest(folder), sites_of(job, skeleton(folder, job.peft, job.task))
    found = []
    for located in claimants:
        place, claim = claim_folder(located), new_claim(job, located.party.name, base_digest=digest, sites=sites)
        found.append((place.claim_file(job.digest), place.write(claim)))
    return found


def _stamped(job: Job, claimants: list[LocatedParty], stamp: Path) -> tuple[Path, Commitment]:
    if len(claimants) != 1:
        raise ConfigError(
            "BAD_COMBINATION", "a time stamp is on one commitment", where="--stamp", fix="name its party with `--party`"
        )
    place = claim_folder(claimants[0])
    return place.claim_file(job.digest), place.attach(job.digest, stamp)


def new_claim(job: Job, party: str, *, base_digest: str, sites: tuple[MarkSite, ...]) -> Claim:
    """Return a claim with a key, bits and salt that were never used before.

    Args:
        job: The job.
        party: The claimant.
        base_digest: Digest of the base model.
        sites: Where the carrier sits.
    """
    settings = job.ownership
    return Claim(
        party=party,
        job_digest=job.digest,
        base_digest=base_digest,
        carrier=settings.carrier,
        sites=sites,
        key_seed=new_secret(),
        bits=new_bits(settings.num_bits if settings.carrier != "none" else 0),
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
    sites = mark_sites(tunable, settings.carrier)
    rank = (job.peft.r or 0) if settings.carrier == "product" else 0
    free = num_free(sites, rank=rank, only_b=getattr(job.federation, "lora_rule", "") == "FFA-LoRA")
    asked = len(settings.claimants) * settings.num_bits
    if asked > free:
        what = f"{asked} bits of {len(settings.claimants)} claimants do not fit into {free} numbers (E22)"
        if not sites:
            what = f"nothing that is trained is a carrier of the kind `{settings.carrier}` (E22)"
        fix = "lower `num_bits`, take another carrier, or train more: a higher rank, or norms in `peft.modules_to_save`"
        where = job.origins.get("ownership.num_bits", "ownership.num_bits")
        raise ConfigError("BAD_COMBINATION", what, where=where, fix=fix)
    return sites
