"""What a rehearsal has of claims: commitments of the right length to claims that nobody makes, and heads to sign."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedllm.job.job import Job
from fedllm.ownership.claims import Claim, new_secret
from fedllm.ownership.commitments import ClaimFolder, Commitment, commit_to
from fedllm.ownership.log import FOLDER
from fedllm.runs.folder import RunFolder
from fedllm.runtime.copies import hand_out
from fedllm.runtime.federation import LinkedFederation
from fedllm.runtime.host import PartyHost
from fedllm.runtime.signatory import Signatory
from fedllm.wire.ledger import ByteLedger
from fedllm.wire.payload import Tensors


def rehearse_claims(hosts: Mapping[str, PartyHost], job: Job, run: RunFolder) -> None:
    """Let parties sign the log of a rehearsal, with keys that are made for it, and take copies that are not kept.

    Args:
        hosts: The parties.
        job: The job.
        run: The rehearsal's folder.
    """
    for party, host in hosts.items():
        if job.ownership.enabled:
            keys = ClaimFolder(run.path / "keys" / party)
            shown = _commitment(party, keys, run.job_digest) if party in job.ownership.claimants else None
            copy: Path = run.path / "parties" / party / FOLDER
            claimants = tuple(job.ownership.claimants)
            host.signatory = Signatory(party, run.run_id, run.job_digest, keys, copy, shown, claimants)
        if host.take_copy:
            host.take_copy = _forget


def rehearse_copies(
    run: RunFolder, job: Job, federation: LinkedFederation, adapter: Tensors
) -> dict[tuple[str, str], int]:
    """Return what handing out the copies sends, by party and way; they are counted in no round.

    Args:
        run: The rehearsal's folder.
        job: The job.
        federation: To the parties.
        adapter: What the run delivers.
    """
    if job.ownership.trace == "none":
        return {}
    talked, federation.ledger = federation.ledger, ByteLedger()
    hand_out(run, job, federation, adapter)
    sent, federation.ledger = federation.ledger, talked
    return sent.of_round(job.federation.num_rounds)


def _forget(copy: Tensors) -> None:
    """A copy of random numbers is no use."""


def _commitment(party: str, keys: ClaimFolder, job_digest: str) -> Commitment:
    claim = Claim(
        party=party,
        job_digest=job_digest,
        base_digest="0" * 64,
        carrier="none",
        sites=(),
        key_seed=new_secret(),
        bits="",
        threshold=1e-6,
        salt=new_secret(),
    )
    return commit_to(claim, keys.key())
