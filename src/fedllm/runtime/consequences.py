"""What a job will do at one site, found from that site's files alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedllm.data.settings import DataSource, local_path
from fedllm.errors import ConfigError, PolicyError, nearest
from fedllm.job.check import check_job
from fedllm.job.job import Job, LocatedParty
from fedllm.job.policy import Rule, Upload, check_policy, refused_operations, rules
from fedllm.runtime.claims_told import claims_told
from fedllm.runtime.noise import steps_per_round
from fedllm.runtime.plan import foreseen_noise, rehearse
from fedllm.runtime.site import awaits_package, party_examples
from fedllm.runtime.validate import Facts, PartyFacts, validate

_NOISE_LATER = "as the job says; what it comes to here is known once the package is here, and held against the limits"


@dataclass(frozen=True)
class DataRead:
    """One set of examples that the job reads at the site."""

    use: str
    source: str
    examples: int
    truncated: int | None
    dropped: int | None


@dataclass(frozen=True)
class Consequences:
    """What a job does at a site. Bytes up are at most so many; `epsilon` None: no differential privacy.

    Where the base model is still to be sent to the site, what follows from it is None.
    """

    job: str
    job_digest: str
    scenario: str
    party: str
    parties: list[str]
    base: str
    digests: dict[str, str]
    method: dict[str, object]
    trainable_parameters: int | None
    data: list[DataRead]
    num_rounds: int
    steps_per_round: int
    bytes_up_per_round: int | None
    bytes_up_in_all: int | None
    bytes_down_per_round: int | None
    epsilon: float | None
    noise: str
    operations: list[str]
    operations_refused: list[str]
    who_learns_what: tuple[str, ...]
    ownership: tuple[str, ...]
    limits: list[Rule]


def consequences(job: Job, located: LocatedParty) -> Consequences:
    """Return what a job will do at a site. Data and model are checked, and nothing is trained or sent.

    Args:
        job: The job.
        located: The site's own file and where its paths start.

    Raises:
        ConfigError: `PARTY_UNKNOWN`: the job does not name the site.
        PolicyError: The site's own limits forbid the job.
        FedllmError: What else is wrong with job, data or model.
    """
    party = located.party
    if party.name not in job.parties:
        what = f"the job does not name the party `{party.name}`"
        raise ConfigError("PARTY_UNKNOWN", what, where="parties", fix=nearest(party.name, job.parties))
    if awaits_package(job, located):
        return _told_without_model(job, located)
    facts = validate(job, [located])
    traffic = rehearse(job, facts)
    upload = traffic.most_up[party.name]
    if refused := check_policy(job, party, upload=upload):
        refused[0].also = tuple(refused[1:])
        raise refused[0]
    return _told(job, located, facts, upload=upload, bytes_down=traffic.down[party.name])


def _told(job: Job, located: LocatedParty, facts: Facts, *, upload: Upload, bytes_down: int) -> Consequences:
    (here,) = facts.parties
    refused, noise = refused_operations(job, located.party), foreseen_noise(job, here, facts.skeleton.num_trainable())
    requests = job.table_line().operations(job.federation)
    return Consequences(
        job=job.name,
        job_digest=job.digest,
        scenario=job.scenario,
        party=located.party.name,
        parties=list(job.parties),
        base=str(facts.folder),
        digests=facts.digests,
        method=job.peft.model_dump(mode="json"),
        trainable_parameters=facts.skeleton.num_trainable(),
        data=list(_read(job, located, facts, here)),
        num_rounds=job.federation.num_rounds,
        steps_per_round=steps_per_round(job, here.train.kept),
        bytes_up_per_round=upload.per_round,
        bytes_up_in_all=upload.total,
        bytes_down_per_round=bytes_down,
        epsilon=noise.epsilon if noise else None,
        noise=noise.text if noise else "none: the job gives no differential privacy",
        operations=[name for name in requests if name not in refused],
        operations_refused=list(refused),
        who_learns_what=job.table_line().who_learns_what(job.federation, job.privacy),
        ownership=claims_told(job, located),
        limits=rules(job, located.party, upload=upload),
    )


def _told_without_model(job: Job, located: LocatedParty) -> Consequences:
    """Return what can be said while the package is with its owner: it comes with the run, which needs this approval."""
    check_job(job, [located])
    party, data = located.party, party_examples(job, located)
    if not party.limits.max_package_bytes:
        what, fix = "the site has no package and takes none", "copy it here, or raise the limit"
        raise PolicyError("POLICY_REFUSED", what, where=f"party {party.name}, limits.max_package_bytes", fix=fix)
    noise, refused = job.privacy.differential_privacy, refused_operations(job, party)
    reads = {
        "training": (party.data.train, data.train),
        "held-out": (party.data.eval or party.data.train, data.held_out),
    }
    return Consequences(
        job=job.name,
        job_digest=job.digest,
        scenario=job.scenario,
        party=party.name,
        parties=list(job.parties),
        base=f"the package that {job.sender} sends, of {party.limits.max_package_bytes} bytes at most",
        digests={"job": job.digest, "base": job.model.base_digest or ""},
        method=job.peft.model_dump(mode="json"),
        trainable_parameters=None,
        data=[DataRead(use, _place(source, located), len(rows), None, None) for use, (source, rows) in reads.items()],
        num_rounds=job.federation.num_rounds,
        steps_per_round=steps_per_round(job, len(data.train)),
        bytes_up_per_round=None,
        bytes_up_in_all=None,
        bytes_down_per_round=None,
        epsilon=noise.epsilon,
        noise="none: the job gives no differential privacy" if noise.unit == "none" else _NOISE_LATER,
        operations=[name for name in job.table_line().operations(job.federation) if name not in refused],
        operations_refused=list(refused),
        who_learns_what=job.table_line().who_learns_what(job.federation, job.privacy),
        ownership=claims_told(job, located),
        limits=rules(job, party),
    )


def _read(job: Job, located: LocatedParty, facts: Facts, here: PartyFacts) -> Iterator[DataRead]:
    source: DataSource = located.party.data
    counts = here.train
    train = _place(source.train, located)
    yield DataRead("training", train, counts.examples, counts.truncated, counts.dropped)
    if here.held_out is not None:
        is_split_off = source.eval is None and source.eval_split is None
        place = f"{source.eval_share:g} of {train}" if is_split_off else _place(source.eval or source.train, located)
        counts = here.held_out
        yield DataRead("held-out", place, counts.examples, counts.truncated, counts.dropped)
    if facts.common is not None and job.evaluate.test is not None:
        counts = facts.common
        place = str(job.path(job.evaluate.test))
        yield DataRead("test set of the job", place, counts.examples, counts.truncated, counts.dropped)


def _place(source: str, located: LocatedParty) -> str:
    path = local_path(source, located.base_dir)
    # What is no path on this machine is a hub id.
    return str(path.resolve()) if path.exists() else source
