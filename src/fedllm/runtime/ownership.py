"""Commit to claims before a run, and verify claims on a suspect model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from fedllm.errors import ConfigError
from fedllm.job.check import check_job
from fedllm.job.job import Job, LocatedParty
from fedllm.job.ownership import claim_folder
from fedllm.models.adapter import skeleton
from fedllm.models.digest import base_digest
from fedllm.ownership.claims import Claim, find_claim, load_claim, stamp_file
from fedllm.ownership.commitments import Commitment
from fedllm.ownership.directions import directed
from fedllm.ownership.disputes import Standing, standing
from fedllm.ownership.endpoint import Endpoint
from fedllm.ownership.log import OwnershipLog, check_log, find_log, read_log
from fedllm.ownership.stamps import by_stamp, read_certificates, with_stamp
from fedllm.ownership.statistics import MAX_THRESHOLD, THRESHOLD
from fedllm.ownership.suspect import check_base, open_suspect
from fedllm.ownership.triggers import read_text
from fedllm.ownership.verify import Reading, Verdict, judge, read_marks
from fedllm.runtime.asking import Suspected
from fedllm.runtime.marks import new_claim, sites_of
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


@dataclass(frozen=True)
class Evidence:
    """What is laid before an arbiter: claims, opened; their logs, one for all or one each; what else is known.

    `base` is the base model's folder, which a whole model and norms are read against. `seen` is when the suspect was
    first seen, and `keys` are fingerprints of parties' keys that are known by other ways than the logs. `endpoint` is
    where the suspect can be asked. `authorities` are certificates of time stamping authorities that the arbiter trusts;
    without any, the chains of time stamps are not verified. `threshold` is the largest p-value that the arbiter takes;
    a claim's own may only be stricter.
    """

    claims: Sequence[Path]
    logs: Sequence[Path] = ()
    base: Path | None = None
    seen: datetime | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    endpoint: Endpoint | None = None
    authorities: Sequence[Path] = ()
    threshold: float = THRESHOLD


def verify(model: Path | None, evidence: Evidence) -> list[Verdict]:
    """Return a verdict on each claim on a suspect model.

    Args:
        model: The suspect: an adapter's folder, a model's folder, or a run folder; None where there is an endpoint
            alone, at which triggers are asked.
        evidence: What is laid before the arbiter.

    Raises:
        ConfigError: A file is missing, claims and logs do not go together, or `BAD_VALUE`, the threshold.
        IdentityError: `KEY_EXPOSED`, others than its owner can read a claim.
        ModelError: The suspect or the base cannot be read, or it is another base.
        StateLost: `OWNERSHIP_BROKEN`.
    """
    if not 0 < evidence.threshold <= MAX_THRESHOLD:
        what, fix = f"{evidence.threshold:g} is no p-value that proves something", f"give {MAX_THRESHOLD:g} at most"
        raise ConfigError("BAD_VALUE", what, where="--threshold", fix=fix)
    claims = [load_claim(path) for path in evidence.claims]
    trusted = read_certificates(evidence.authorities)
    if evidence.base:
        for expected in sorted({claim.base_digest for claim in claims}):
            check_base(evidence.base, expected)
    logs = _logs(evidence)
    standings: list[Standing | None] = []
    for path, claim, log in zip(evidence.claims, claims, logs, strict=True):
        stamp = stamp_file(find_claim(path))
        found = standing(claim, log, seen=evidence.seen, keys=evidence.keys) if log else None
        if found and found.place:
            standings.append(with_stamp(found, claim, stamp, trusted))
        else:
            # A fingerprint is in no log, also where other claims are judged beside it.
            standings.append(by_stamp(claim, stamp, trusted, seen=evidence.seen) or found)
    readings = _readings(model, evidence, claims, logs)
    return judge(claims, standings, readings, threshold=evidence.threshold)


def _readings(
    model: Path | None, evidence: Evidence, claims: Sequence[Claim], logs: Sequence[OwnershipLog | None]
) -> Callable[[Claim], Sequence[Reading]]:
    suspected = Suspected(model, evidence.base, evidence.endpoint)
    # Answers are written by the model as it is: where no claim has bits, nothing is read against a base.
    suspect = open_suspect(model, evidence.base) if model and any(claim.bits for claim in claims) else None
    # An adapter writes nothing without its base; then its bits must do.
    writes = any(claim.triggers and (evidence.endpoint or evidence.base or not claim.bits) for claim in claims)
    ask = suspected.asker() if writes or suspect is None else None
    drawn = {claim.commitment(): directed(claim, log) for claim, log in zip(claims, logs, strict=True)}
    way = "endpoint" if evidence.endpoint else "generate"

    def read(claim: Claim) -> Sequence[Reading]:
        known = drawn[claim.commitment()]
        marks = read_marks(known, suspect) if suspect and known else []
        return [*marks, *(read_text(claim, ask, way=way) if ask else [])]

    return read


def _logs(evidence: Evidence) -> list[OwnershipLog | None]:
    count, paths = len(evidence.claims), list(evidence.logs)
    if len(paths) not in (0, 1, count):
        what = f"{len(paths)} logs for {count} claims"
        raise ConfigError("BAD_VALUE", what, where="--log", fix="give one log for all claims, or one each")
    return [_checked(path) for path in paths * (count if len(paths) == 1 else 1)] or [None] * count


def _checked(path: Path) -> OwnershipLog:
    folder = find_log(path)
    log = read_log(folder)
    check_log(log, where=folder)
    return log
