"""Claims and logs without a run: what a dispute is about, made in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.ownership.claims import DRAWN, Claim, MarkSite, new_bits, new_secret
from fedllm.ownership.commitments import commit_to
from fedllm.ownership.directions import share_of
from fedllm.ownership.keys import public_hex, sign
from fedllm.ownership.log import (
    HEAD_PURPOSE,
    OwnershipLog,
    SignedHead,
    commitment_entry,
    party_entry,
    round_entry,
    share_entry,
)

JOB, OTHER_JOB, BASE, RUN = "a" * 64, "c" * 64, "b" * 64, "d" * 32
BEFORE, AFTER = "2026-03-01T12:00:00+00:00", "2026-03-02T12:00:00+00:00"
KEYS = {name: Ed25519PrivateKey.generate() for name in ("north", "east", "south", "thief")}


def claim_of(party: str = "north", job: str = JOB, **changes: object) -> Claim:
    """Return a new claim of a party on a job."""
    fields: dict[str, object] = {
        "party": party,
        "job_digest": job,
        "base_digest": BASE,
        "carrier": "product",
        "sites": (MarkSite(name="layer", rows=8, columns=8),),
        "key_seed": new_secret(),
        "bits": new_bits(32),
        "threshold": 1e-6,
        "salt": new_secret(),
    }
    return Claim.model_validate(fields | changes)


def drawn_of(party: str = "north", **changes: object) -> Claim:
    """Return a new claim as its marks are read, without a log that says where they are."""
    return claim_of(party, form=DRAWN, **changes)


def signed(log: OwnershipLog, number: int, time: str, *, by: Sequence[str], job: str = JOB) -> OwnershipLog:
    """Return the log with a head that these parties signed."""
    head = log.head(number, time, run_id=RUN, job_digest=job)
    signatures = {party: sign(KEYS[party], head.text(), purpose=HEAD_PURPOSE) for party in by}
    return log.with_head(SignedHead(head=head, signatures=signatures))


def shared(log: OwnershipLog, *, by: Sequence[str]) -> OwnershipLog:
    """Return an opened log with the shares of these parties."""
    root = log.heads[0].head.root
    return log.with_entries(*(share_entry(party, share_of(KEYS[party], root)) for party in by))


def log_of(
    *claims: Claim,
    parties: Sequence[str] = ("north", "east"),
    job: str = JOB,
    late: Sequence[Claim] = (),
    shares: bool = True,
    time: str = BEFORE,
) -> OwnershipLog:
    """Return the log of a run of one round; `late` claims are committed to after round 0."""
    keys = [party_entry(party, public_hex(KEYS[party])) for party in parties]
    first = OwnershipLog((*keys, *(commitment_entry(commit_to(one, KEYS[one.party])) for one in claims)))
    opened = signed(first, 0, time, by=parties, job=job)
    if shares:
        opened = signed(shared(opened, by=parties), 0, time, by=parties, job=job)
    more = [commitment_entry(commit_to(one, KEYS[one.party])) for one in late]
    return signed(opened.with_entries(round_entry(0, "e" * 64), *more), 0, max(time, AFTER), by=parties, job=job)


def folder_of(log: OwnershipLog, folder: Path) -> Path:
    """Return a folder with a log in it."""
    log.write(folder)
    return folder
