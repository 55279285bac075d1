"""Check everything about a job that can be known without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fedllm.data.read import PartyData, read_party_data
from fedllm.data.template import template_digest
from fedllm.data.tokens import TokenReport
from fedllm.errors import DataError, FedllmError, ModelError, PolicyError
from fedllm.job.check import check_job
from fedllm.job.job import Job, LocatedParty
from fedllm.job.policy import Upload, check_upload
from fedllm.models.adapter import TunableModel, skeleton
from fedllm.models.digest import base_digest, tokenizer_digest
from fedllm.models.load import check_machine, check_quantisation, load_tokenizer
from fedllm.runtime.marks import sites_of
from fedllm.runtime.site import base_folder, common_examples, data_settings, tokens_of

T = TypeVar("T")


@dataclass(frozen=True)
class PartyFacts:
    """What a party's data come to."""

    party: str
    train: TokenReport
    held_out: TokenReport | None


@dataclass(frozen=True)
class Facts:
    """What was found."""

    folder: Path
    digests: dict[str, str]
    skeleton: TunableModel
    parties: list[PartyFacts]
    common: TokenReport | None

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain values."""
        return {
            "base": str(self.folder),
            "digests": self.digests,
            "trainable_parameters": self.skeleton.num_trainable(),
            "parties": [asdict(party) for party in self.parties],
            "common": asdict(self.common) if self.common else None,
        }


def validate(job: Job, parties: list[LocatedParty]) -> Facts:
    """Return the facts about a job that holds together.

    Args:
        job: The job.
        parties: Its party files.

    Raises:
        FedllmError: The first thing that is wrong, with the others in `also`.
    """
    check_job(job, parties)
    folder, device = base_folder(job, parties)
    check_machine(job.model, device)
    check_quantisation(job.model)
    tokenizer = load_tokenizer(folder)
    settings, errors = data_settings(job), list[FedllmError]()
    digests = {
        "job": job.digest,
        "base": base_digest(folder),
        "tokenizer": tokenizer_digest(tokenizer),
        "template": template_digest(tokenizer, settings),
    }
    tunable = _collect(errors, lambda: skeleton(folder, job.peft, job.task))
    facts = [_collect(errors, partial(_party_facts, job, located, tokenizer)) for located in parties]
    common = _collect(errors, lambda: _tokens(common_examples(job), tokenizer, job, "evaluate.test"))
    if job.model.base_digest not in (None, digests["base"]):
        errors.append(_foreign_base(job, folder, digests["base"]))
    if tunable:
        errors += upload_limits(job, parties, tunable)
        _collect(errors, partial(sites_of, job, tunable))
    if errors or tunable is None:
        errors[0].also = (*errors[0].also, *errors[1:])
        raise errors[0]
    return Facts(folder, digests, tunable, [found for found in facts if found], common)


def _collect(errors: list[FedllmError], find: Callable[[], T]) -> T | None:
    try:
        return find()
    except FedllmError as error:
        errors.append(error)
        return None


def _party_facts(job: Job, located: LocatedParty, tokenizer: Any) -> PartyFacts:
    name = located.party.name
    read: PartyData = read_party_data(
        located.party.data,
        base_dir=located.base_dir,
        settings=job.data,
        seed=job.seed,
        party=name,
    )
    train = _tokens(read.train, tokenizer, job, f"party {name}")
    if train is None:
        raise DataError("DATA_EMPTY", "the party has no training example", where=f"party {name}")
    return PartyFacts(name, train, _tokens(read.held_out, tokenizer, job, f"party {name}, held-out examples"))


def _tokens(examples: Any, tokenizer: Any, job: Job, where: str) -> TokenReport | None:
    return tokens_of(examples, tokenizer, job, where=where)[1] if examples else None


def _foreign_base(job: Job, folder: Path, digest: str) -> ModelError:
    return ModelError(
        "MODEL_MISMATCH",
        f"the base model in {folder} has digest {digest[:16]}..., the job names another",
        where=job.origins.get("model.base_digest", "model.base_digest"),
        fix="copy the base model that the job names",
    )


def upload_limits(job: Job, parties: list[LocatedParty], tunable: TunableModel) -> list[PolicyError]:
    """Return an error per limit of a party that its updates alone would pass.

    Args:
        job: The job.
        parties: The parties.
        tunable: The model with its adapter.
    """
    return [error for located in parties for error in check_upload(_upload(job, located, tunable), located.party)]


def _upload(job: Job, located: LocatedParty, tunable: TunableModel) -> Upload:
    settings, answer, name = job.federation, job.table_line().answer, located.party.name
    # Every other round may send something else.
    odd, even = (
        sum(spec.num_bytes for spec in answer(settings, tunable.manifest, number, name).values()) for number in (1, 2)
    )
    rounds = settings.num_rounds
    return Upload(max(odd, even if rounds > 1 else 0), odd * -(-rounds // 2) + even * (rounds // 2))
