"""What a job's marks do not go with (E22), and where a party keeps its claims."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedllm.ownership.commitments import ClaimFolder, need_bound
from fedllm.tasks import CLASSIFICATION

if TYPE_CHECKING:
    from fedllm.job.job import Job, LocatedParty

# Rules for LoRA's factors under which the mean of the updates is not where a mark was put.
_LOSING = {
    "FedSA-LoRA": "factor B stays at its party, so no product is shared",
    "FedEx-LoRA": "a part of each product is added to the base, where a claimant's pull does not see it",
    "FLoRA": "each round begins with fresh factors, whose product is not the one that is marked",
}


def claim_folder(located: LocatedParty) -> ClaimFolder:
    """Return a party's folder of claims: `ownership.folder` of its file, or `ownership-NAME` beside it.

    Args:
        located: The party.
    """
    name = located.party.ownership.folder or f"ownership-{located.party.name}"
    return ClaimFolder((located.base_dir / name).resolve())


def check_committed(job: Job, parties: list[LocatedParty]) -> None:
    """Raise where a claimant on this machine has not committed to a claim on the job's model.

    Args:
        job: The job.
        parties: The parties of this machine.

    Raises:
        ConfigError: `OWNERSHIP_UNCOMMITTED` (E23).
        IdentityError: A claim or a commitment was changed.
    """
    for located in parties:
        if located.party.name in job.ownership.claimants:
            folder = claim_folder(located)
            folder.commitment(job.digest)
            need_bound(folder.claim(job.digest), f"party {located.party.name}")


def ownership_clashes(job: Job) -> Iterator[tuple[str, str, str]]:
    """Yield what cannot hold together, as (key, what, fix).

    Args:
        job: The job.
    """
    for name in job.ownership.claimants:
        if name not in job.parties:
            yield "ownership.claimants", f"{name!r} is no party of the job", "name parties of the job"
    if job.ownership.claimants and job.scenario == "FedOST":
        what = "a claim is bound to the package; the owner's whole model, which leaves, has other names of layers (E22)"
        fix = "leave `ownership` out; the owner can mark its model by `fedllm ownership fingerprint` before it builds"
        yield "ownership.claimants", what, fix
    if job.ownership.carrier == "product":
        yield from _of_the_product(job)
    if job.ownership.carrier != "none" or job.ownership.num_triggers:
        yield from _of_the_mean(job)
    if job.ownership.num_triggers:
        yield from _of_the_triggers(job)
    if job.ownership.trace != "none":
        yield from _of_the_copies(job)


def _of_the_product(job: Job) -> Iterator[tuple[str, str, str]]:
    key, fix = "ownership.carrier", "set `peft_type: LORA`, or `carrier: norms` with norms that are trained"
    if job.peft.peft_type != "LORA":
        yield key, f"{job.peft.peft_type} has no product of factors that could be marked (E22)", fix
    elif job.peft.use_dora:
        what = "DoRA scales the product anew, so a mark in it is not in the merged weights (E22)"
        yield key, what, "set `use_dora: false`"
    rule = getattr(job.federation, "lora_rule", "FedIT")
    if rule in _LOSING:
        yield key, f"with {rule} {_LOSING[rule]} (E22)", "set another `federation.lora_rule`, such as FedIT"
    if getattr(job.federation, "ranks", None):
        what = "a party of lower rank trains another product than the others, and would mark that (E22)"
        yield key, what, "leave `federation.ranks` out"


def _of_the_triggers(job: Job) -> Iterator[tuple[str, str, str]]:
    key, fix = "ownership.num_triggers", "leave `num_triggers` out; bits in a `carrier` do without text"
    if job.data.task == CLASSIFICATION:
        yield key, "a classifier writes no text that could hold an answer", fix


def _of_the_copies(job: Job) -> Iterator[tuple[str, str, str]]:
    key = "ownership.trace"
    if job.scenario != "FedHomoLLM":
        yield (
            key,
            f"what {job.scenario} hands out goes by a message of its own, of which there are no copies",
            "leave it out",
        )
    elif getattr(job.federation, "lora_rule", "") == "FedSA-LoRA":
        yield key, "with FedSA-LoRA each party has an adapter of its own, so there are no copies", "leave it out"
    if job.peft.peft_type != "LORA":
        yield key, f"{job.peft.peft_type} has no factor B that could be marked (E22)", "set `peft_type: LORA`"
    elif job.peft.use_dora:
        what = "DoRA scales the product anew, so a mark in it is not in the merged weights (E22)"
        yield key, what, "set `use_dora: false`"


def _of_the_mean(job: Job) -> Iterator[tuple[str, str, str]]:
    if getattr(getattr(job.federation, "strategy", None), "name", "") == "SCAFFOLD":
        what = "SCAFFOLD's control variates would take a mark's steps for gradients, and take them away (E22)"
        yield "ownership.carrier", what, "set another `federation.strategy`"
    robust = getattr(getattr(job.federation, "robust", None), "name", "none")
    if robust not in ("none", "NormClipping"):
        what = f"{robust} takes away what one party alone pushes, and so its mark (E22)"
        key = "ownership.carrier" if job.ownership.carrier != "none" else "ownership.num_triggers"
        yield key, what, "set `robust: {name: NormClipping}`, or leave `robust` out"
