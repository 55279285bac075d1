"""What a site allows: its own limits beside what a job asks, and the only place where the two are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedllm.errors import PolicyError, nearest
from fedllm.job.party import Limits, Party
from fedllm.privacy.differential import DifferentialPrivacySettings

if TYPE_CHECKING:
    from fedllm.job.job import Job

# The requests around a conversation, which every scenario needs. `runtime/base.py` has them; a test compares.
HANDSHAKE_REQUESTS = ("Hello", "Restore", "Witness", "ShowCommitment", "SignHead")
# What brings a package to a site, in a job whose owner sends it; `runtime/package_messages.py` has them.
PACKAGE_REQUESTS = ("OfferPackage", "WantPackage", "SealPackage", "TakeKey", "GivePiece", "TakePiece")
# The steps of a secure sum, which a job with secure aggregation needs; `runtime/sum_messages.py` has them.
SUM_REQUESTS = ("ShowKeys", "SealShares", "TakeShares", "AgreeSum", "OpenSum")
_ASK_SITE = "or ask the site to change its own limit"


@dataclass(frozen=True)
class Upload:
    """Bytes that leave a party: at most in one round, and in the whole run."""

    per_round: int
    total: int


@dataclass(frozen=True)
class Rule:
    """One limit of a site, beside what a job asks."""

    key: str
    asked: str
    allowed: str
    holds: bool
    fix: str


def rules(job: Job, party: Party, *, upload: Upload | None = None, baseline: bool = False) -> list[Rule]:
    """Return each limit of a site that a job meets or breaks, in the order of party.yaml.

    Args:
        job: The job.
        party: The site's own file.
        upload: What the site would send; None where it is not known yet, and then its limits are left out.
        baseline: The job is a yardstick of one party, which sends nothing to others.
    """
    limits = party.limits
    found = [*_what_runs(job, limits), _rounds(job, limits)]
    if not baseline:
        found += _parties(job, limits)
    if upload is not None:
        found += _upload(upload, limits)
    # A yardstick of one party leaves nobody's hands.
    asked = () if baseline else (*_secure(job, limits), *_private(job.privacy.differential_privacy, limits))
    return [*found, *asked]


def check_policy(job: Job, party: Party, *, upload: Upload | None = None, baseline: bool = False) -> list[PolicyError]:
    """Return an error for each limit of a site that a job breaks.

    Args:
        job: The job.
        party: The site's own file.
        upload: What the site would send, if it is known.
        baseline: The job is a yardstick of one party.
    """
    return [_error(rule, party) for rule in rules(job, party, upload=upload, baseline=baseline) if not rule.holds]


def refused_operations(job: Job, party: Party) -> tuple[str, ...]:
    """Return the requests of the job's scenario that a site does not answer.

    Args:
        job: The job.
        party: The site's own file.
    """
    allowed = party.limits.allowed_operations
    return () if allowed is None else tuple(name for name in _operations(job) if name not in allowed)


def check_operation(kind: str, *, job: Job, party: Party) -> None:
    """Return if a site answers a request of this kind in this job.

    Args:
        kind: Name of the payload's kind.
        job: The job that the message belongs to.
        party: The site's own file.

    Raises:
        PolicyError: `POLICY_REFUSED`.
    """
    steps = SUM_REQUESTS if job.privacy.secure_aggregation.enabled else ()
    copies = () if job.ownership.trace == "none" else ("Copy",)
    packages = PACKAGE_REQUESTS if job.sender else ()
    known = (*_operations(job), *HANDSHAKE_REQUESTS, *steps, *copies, *packages)
    if kind not in known:
        rule = Rule("scenario", f"`{kind[:64]}`", f"the requests of {job.scenario}", False, nearest(kind[:64], known))
        raise _error(rule, party)
    if kind in refused_operations(job, party):
        raise _error(_operation_rule(kind, party.limits), party)


def check_upload(upload: Upload, party: Party) -> list[PolicyError]:
    """Return an error for each limit of a site on what leaves it that is passed.

    Args:
        upload: Bytes in one round and in the run: foretold, or sent with the answer that is about to leave.
        party: The site's own file.
    """
    return [_error(rule, party) for rule in _upload(upload, party.limits) if not rule.holds]


def _error(rule: Rule, party: Party) -> PolicyError:
    what = f"`{rule.key}`: the job asks for {rule.asked}, the site allows {rule.allowed}"
    return PolicyError("POLICY_REFUSED", what, where=f"party {party.name}, limits.{rule.key}", fix=rule.fix)


def _operations(job: Job) -> tuple[str, ...]:
    return job.table_line().operations(job.federation)


def _what_runs(job: Job, limits: Limits) -> Iterator[Rule]:
    yield _listed("allowed_scenarios", "the scenario", job.scenario, limits.allowed_scenarios)
    yield _listed("allowed_methods", "the tuning method", job.peft.peft_type, limits.allowed_methods)
    # A party that answers no request to train has no part in the run; the others are refused one by one.
    for request in job.table_line().requests:
        if request.commits:
            yield _operation_rule(request.__name__, limits)


def _operation_rule(kind: str, limits: Limits) -> Rule:
    return _listed("allowed_operations", "the operation", kind, limits.allowed_operations)


def _listed(key: str, noun: str, asked: str, allowed: list[str] | None) -> Rule:
    shown = "any" if allowed is None else ", ".join(f"`{name}`" for name in allowed) or "none"
    fix = f"change the job, {_ASK_SITE}"
    return Rule(key, f"{noun} `{asked}`", shown, allowed is None or asked in allowed, fix)


def _rounds(job: Job, limits: Limits) -> Rule:
    fix = f"lower `federation.num_rounds`, {_ASK_SITE}"
    return _at_most("max_rounds", job.federation.num_rounds, limits.max_rounds, "rounds", fix)


def _parties(job: Job, limits: Limits) -> Iterator[Rule]:
    least, shown = limits.min_parties, f"{limits.min_parties} or more"
    asked = f"{len(job.parties)} parties"
    yield Rule("min_parties", asked, shown, len(job.trainers) >= least, f"add parties, {_ASK_SITE}")
    quorum = job.federation.min_parties
    fix = f"raise `federation.min_parties` to {least}, {_ASK_SITE}"
    yield Rule("min_parties", f"rounds with {quorum} parties", shown, quorum >= least, fix)


def _upload(upload: Upload, limits: Limits) -> Iterator[Rule]:
    fix = f"lower `peft.r` or take fewer target modules, {_ASK_SITE}"
    most = limits.max_upload_bytes_per_round
    yield _at_most("max_upload_bytes_per_round", upload.per_round, most, "bytes up in one round", fix)
    fix = f"lower `peft.r` or `federation.num_rounds`, {_ASK_SITE}"
    yield _at_most("max_upload_bytes", upload.total, limits.max_upload_bytes, "bytes up in the whole run", fix)


def _secure(job: Job, limits: Limits) -> Iterator[Rule]:
    demanded, has = limits.require_secure_aggregation, job.privacy.secure_aggregation.enabled
    shown = "only jobs with secure aggregation" if demanded else "jobs without"
    fix = f"set `privacy.secure_aggregation.enabled: true`, {_ASK_SITE}"
    asked = "secure aggregation" if has else "no secure aggregation"
    yield Rule("require_secure_aggregation", asked, shown, has or not demanded, fix)


def _private(asked: DifferentialPrivacySettings, limits: Limits) -> Iterator[Rule]:
    most, key = limits.max_epsilon, "privacy.differential_privacy"
    shown = "any" if most is None else f"an epsilon of {most:g} at most"
    if asked.unit == "none":
        what, fix = "training without differential privacy", f"set `{key}: {{unit: example, epsilon: {most}}}`"
    elif asked.epsilon is None:
        what, fix = "noise of which the epsilon is not said", f"set `{key}.epsilon` in place of noise_multiplier"
    else:
        what, fix = f"an epsilon of {asked.epsilon:g}", f"lower `{key}.epsilon`"
    own = asked.placement != "central"
    if not own and asked.epsilon is not None:
        what = "noise that the server adds when it has the updates"
        fix = f"set `{key}.placement: distributed` with secure aggregation, or `unit: example`"
    holds = most is None or (own and asked.epsilon is not None and asked.epsilon <= most)
    yield Rule("max_epsilon", what, shown, holds, f"{fix}, {_ASK_SITE}")
    if most is not None and asked.delta is not None:
        allowed, fix = f"{limits.max_delta:g} at most", f"lower `{key}.delta`, {_ASK_SITE}"
        yield Rule("max_delta", f"a delta of {asked.delta:g}", allowed, asked.delta <= limits.max_delta, fix)


def _at_most(key: str, asked: int, most: int | None, unit: str, fix: str) -> Rule:
    shown = "any number" if most is None else f"{most} at most"
    return Rule(key, f"{asked} {unit}", shown, most is None or asked <= most, fix)
