"""Where a claim's commitment stands in a log, and why it does not count if it does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from fedllm.errors import ConfigError
from fedllm.ownership.claims import Claim
from fedllm.ownership.commitments import Commitment
from fedllm.ownership.directions import against_the_form
from fedllm.ownership.keys import fingerprint
from fedllm.ownership.log import OwnershipLog, SignedHead, commitment_entry
from fedllm.ownership.merkle import consistency_proof, inclusion_proof, leaf_hash


@dataclass(frozen=True)
class Place:
    """A commitment's place in a log, and the proof of it against the head that all parties signed before round 0.

    `inclusion` leads from `leaf` to `root`; `consistency` shows that the newest head only added to that one. `stamp` is
    the SHA-256 of a time stamp, and `stamp_time` what it says, where its chain was verified; else both are empty.
    `confirmed` says that the keys of all signers but the claimant are known by other ways than the log.
    """

    index: int
    size: int
    root: str
    time: str
    signers: tuple[str, ...]
    inclusion: tuple[str, ...]
    leaf: str
    newest_size: int
    newest_root: str
    consistency: tuple[str, ...]
    key: str
    stamp: str
    stamp_time: str = ""
    confirmed: bool = False


@dataclass(frozen=True)
class Standing:
    """What a log says of a claim: its place, or the reasons why it proves nothing.

    `stamp_time` is what a verified time stamp says that stands in the place of a log, see `stamps.by_stamp`.
    """

    place: Place | None
    reasons: tuple[str, ...]
    stamp_time: str = ""


def standing(
    claim: Claim, log: OwnershipLog, *, seen: datetime | None = None, keys: Mapping[str, str] | None = None
) -> Standing:
    """Return where a claim's commitment stands in a log that `check_log` found whole.

    Args:
        claim: The claim, opened.
        log: The log.
        seen: When the suspect model was first seen; a commitment must be older.
        keys: Fingerprints of parties' keys that are known by other ways than the log.
    """
    digest = claim.commitment()
    found = [(index, one) for index, one in log.commitments() if one.digest == digest]
    opening = log.heads[0]
    if not found:
        return Standing(None, (_why_not(claim, log),))
    index, commitment = found[0]
    reasons = (
        *_against_the_commitment(claim, commitment, log),
        *_against_the_others(log),
        *_against_the_date(index, opening, log, seen),
        *_against_the_keys(log, keys or {}),
        *against_the_form(claim, log),
    )
    place = None if index >= opening.head.size else _place(index, commitment, log)
    confirmed = _is_confirmed(claim, log, keys or {})
    return Standing(replace(place, confirmed=confirmed) if place else None, reasons)


def _why_not(claim: Claim, log: OwnershipLog) -> str:
    job = log.heads[0].head.job_digest
    own = [one for _, one in log.commitments() if one.party == claim.party]
    if claim.job_digest != job:
        what = f"the claim is on the job {claim.job_digest[:16]}, and the log is of the job {job[:16]}"
        return f"{what}: a claim on one job's model is none on another's"
    if own:
        return (
            f"the log has another commitment of `{claim.party}` than this claim opens to: key, bits, triggers, "
            "threshold or salt are not those that were committed to"
        )
    return (
        f"the log has no commitment of `{claim.party}`: a key that is chosen when the model is known fits any model, "
        "so it proves nothing (E23)"
    )


def _against_the_commitment(claim: Claim, commitment: Commitment, log: OwnershipLog) -> Iterator[str]:
    job, keys = log.heads[0].head.job_digest, log.keys()
    if commitment.job_digest != job or claim.job_digest != job:
        yield (
            f"the commitment is to the job {claim.job_digest[:16]} and was replayed in the log of the job {job[:16]}: "
            "a claim on one job's model is none on another's"
        )
    if not commitment.is_sound() or keys.get(commitment.party) != commitment.public_key:
        yield f"the commitment is not signed by the key of `{commitment.party}` that the log names"
    if (commitment.party, commitment.base_digest) != (claim.party, claim.base_digest):
        yield "the commitment names another party or base model than the claim"


def _against_the_others(log: OwnershipLog) -> Iterator[str]:
    # What came after the first head counts for nobody, and whoever writes to a copy of the log could put it there.
    opened = OwnershipLog(log.entries[: log.heads[0].head.size])
    for what in opened.against_commitments():
        yield f"the log has {what}: among several a claimant can choose when the model is known"


def _against_the_date(index: int, opening: SignedHead, log: OwnershipLog, seen: datetime | None) -> Iterator[str]:
    head = opening.head
    if index >= head.size:
        after = next((one.head for one in log.heads if one.head.size > index), None)
        when = f"; the first signed head with it is of round {after.round}, {after.time}" if after else ""
        yield f"the commitment came late: it is entry {index}, and before round 0 there were {head.size}{when}"
    elif seen and datetime.fromisoformat(head.time) >= seen:
        yield f"the commitment is of {head.time}, and the suspect was seen on {seen.isoformat()} already"
    if missing := sorted(log.keys().keys() - opening.signatures.keys()):
        yield f"the head before round 0 is not signed by {', '.join(missing)}"


def _against_the_keys(log: OwnershipLog, known: Mapping[str, str]) -> Iterator[str]:
    found = log.keys()
    for party, expected in sorted(known.items()):
        if party in found and fingerprint(found[party]) != expected:
            yield f"the log's key of `{party}` is not the one that is known to be the party's"
    if known and not known.keys() & found.keys():
        yield f"the log names none of the parties whose keys are known, {', '.join(sorted(known))}"


def _is_confirmed(claim: Claim, log: OwnershipLog, known: Mapping[str, str]) -> bool:
    others = {party: fingerprint(key) for party, key in log.keys().items() if party != claim.party}
    return bool(others) and all(known.get(party) == key for party, key in others.items())


def _place(index: int, commitment: Commitment, log: OwnershipLog) -> Place:
    opening, newest = log.heads[0], log.heads[-1].head
    leaves = log.leaves[: opening.head.size]
    return Place(
        index=index,
        size=opening.head.size,
        root=opening.head.root,
        time=opening.head.time,
        signers=tuple(sorted(opening.signatures)),
        inclusion=tuple(step.hex() for step in inclusion_proof(leaves, index)),
        leaf=leaf_hash(commitment_entry(commitment).encode()).hex(),
        newest_size=newest.size,
        newest_root=newest.root,
        consistency=tuple(step.hex() for step in consistency_proof(log.leaves[: newest.size], opening.head.size)),
        key=fingerprint(commitment.public_key),
        stamp=commitment.stamp,
    )


def parse_date(text: str) -> datetime:
    """Return a moment in UTC; a date alone is the beginning of its day.

    Args:
        text: ISO 8601, such as 2026-05-31 or 2026-05-31T12:00:00+02:00.

    Raises:
        ConfigError: `BAD_VALUE`.
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError("BAD_VALUE", f"{text[:40]!r} is no date", where="--seen", fix="write 2026-05-31") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
