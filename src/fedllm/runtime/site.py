"""What a process loads once for all its parties: the base model, the adapter on it, and each party's tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedllm.data.batches import need_isolated_packing
from fedllm.data.formats import Example
from fedllm.data.read import PartyData, read_examples, read_party_data
from fedllm.data.settings import DataSettings
from fedllm.data.template import template_digest
from fedllm.data.tokens import TokenisedExample, TokenReport, tokenise_all
from fedllm.errors import ConfigError, DataError, ModelError
from fedllm.job.job import Job, LocatedParty
from fedllm.job.ownership import claim_folder
from fedllm.models.adapter import TunableModel
from fedllm.models.blocks import Cut
from fedllm.models.emulator_settings import EmulatorSettings
from fedllm.models.full import FullModel
from fedllm.models.load import Base, find_base, load_base
from fedllm.ownership.commitments import ClaimFolder
from fedllm.privacy.budget import PURSE_FOLDER, Purse
from fedllm.runs.folder import RunFolder
from fedllm.runtime.host import Blobs
from fedllm.scenarios.base import TokenData
from fedllm.train.supervised import check_precision
from fedllm.wire.payload import Tensors


@dataclass
class Site:
    """A process's share of a run: one frozen base model, however many parties.

    `deliver` takes a party's own adapter, by default into the run folder. `purses` says where each party keeps what
    has been spent of its privacy; by default it is beside the run folder. `claims` is where each claimant of the
    model has its claim. Where an emulator's owner runs here, `full` is its whole model, `emulator` how the emulator was
    made, and `public` the text that it goes on distilling on. `awaiting` are the parties to whom the base model is yet
    to be sent, and `most_package_bytes` says how long it may be for each party.
    """

    job: Job
    base: Base
    folder: Path
    model: TunableModel
    blobs: Blobs
    common: list[TokenisedExample]
    common_digest: str
    template_digest: str
    deliver: Callable[[Site, RunFolder, str, Tensors], None] | None = None
    purses: Mapping[str, Purse] = field(default_factory=dict)
    claims: Mapping[str, ClaimFolder] = field(default_factory=dict)
    full: FullModel | None = None
    most_package_bytes: Mapping[str, int] = field(default_factory=dict)
    awaiting: frozenset[str] = frozenset()
    emulator: EmulatorSettings | None = None
    public: Sequence[TokenisedExample] = ()


def base_folder(job: Job, parties: list[LocatedParty]) -> tuple[Path, str]:
    """Return the folder of the base model, and the device, that all parties on this machine share.

    Args:
        job: The job.
        parties: The parties that run here.

    Raises:
        ConfigError: `BAD_COMBINATION` when parties on one machine name different folders or devices.
        ModelError: `MODEL_NOT_FOUND`; also where it is still to be sent to all of them.
    """
    there = [located for located in parties if not awaits_package(job, located)]
    found = {_own_base(job, located) for located in there}
    if parties and not found:
        raise _no_package(job, f"the package of {job.sender} is not here yet")
    devices = {located.party.device for located in parties}
    if len(found) > 1 or len(devices) > 1:
        raise ConfigError(
            "BAD_COMBINATION",
            f"on one machine the parties share one base model on one device; they name {len(found)} folders and "
            f"{len(devices)} devices",
            where="party files",
            fix="give them the same `model_name_or_path` and `device`",
        )
    return found.pop(), devices.pop()


def _own_base(job: Job, located: LocatedParty) -> Path:
    """Return the folder of a party's base model."""
    own = located.party.model_name_or_path
    try:
        return find_base(job.model, base_dir=located.base_dir if own else job.base_dir, override=own)
    except ModelError as error:
        if error.code == "MODEL_NOT_FOUND" and getattr(job.federation, "owner", None):
            raise _no_package(job, error.what) from None
        raise


def _no_package(job: Job, what: str) -> ModelError:
    made = "`fedllm emulator build JOB` makes the package at its owner"
    fix = f"{made}; the run brings it to the others" if job.sender else f"{made}; copy it here, or set"
    fix += "" if job.sender else " `federation.package: send`"
    return ModelError("MODEL_NOT_FOUND", what, where="model.model_name_or_path", fix=fix)


def awaits_package(job: Job, located: LocatedParty) -> bool:
    """Return whether a party's base model is still to be sent to it.

    Args:
        job: The job.
        located: The party.
    """
    if job.sender in (None, located.party.name):
        return False
    own = located.party.model_name_or_path
    base_dir, name = (located.base_dir, own) if own else (job.base_dir, job.model.model_name_or_path)
    # What is no folder here may be a hub id, but whose owner sends it is not to be had there.
    return not (base_dir / Path(name).expanduser()).is_dir()


def need_packages(job: Job, parties: list[LocatedParty]) -> None:
    """Raise where the base model is still to be sent to a party: a worker process that has none cannot wait for it.

    Args:
        job: The job.
        parties: The parties of this machine.

    Raises:
        ConfigError: `BAD_COMBINATION`.
    """
    if missing := [located.party.name for located in parties if awaits_package(job, located)]:
        what = f"the package of {job.sender} is still to come to {', '.join(missing)}, and worker processes do not wait"
        fix = "leave `--workers` out, or name a folder that is there"
        raise ConfigError("BAD_COMBINATION", what, where="--workers", fix=fix)


def open_site(job: Job, parties: list[LocatedParty], *, base: Base | None = None) -> Site:
    """Return the loaded base model with a fresh adapter, and the common test set.

    Args:
        job: The job.
        parties: The parties that run in this process.
        base: A base model that is loaded already.
    """
    torch.set_num_threads(job.runtime.num_threads)
    folder, device = base_folder(job, parties)
    base = base or load_base(job.model, folder=folder, device=device, task=job.task)
    check_precision(job.train, torch.device(device))
    if job.data.packing:
        need_isolated_packing(base.model)
    settings = data_settings(job)
    common, digest = common_tokens(job, base)
    return Site(
        job=job,
        base=base,
        folder=folder,
        model=TunableModel(base.model, job.peft, job.task.name),
        blobs=Blobs({}),
        common=common,
        common_digest=digest,
        template_digest=template_digest(base.tokenizer, settings),
        purses={
            located.party.name: Purse(located.base_dir / PURSE_FOLDER, located.party.limits.max_epsilon)
            for located in parties
        },
        claims={located.party.name: claim_folder(located) for located in parties},
        full=owners_model(job, parties),
        most_package_bytes={located.party.name: located.party.limits.max_package_bytes for located in parties},
        awaiting=frozenset(located.party.name for located in parties if awaits_package(job, located)),
        **_owners_text(job, parties, base),
    )


def owners_model(job: Job, parties: list[LocatedParty]) -> FullModel | None:
    """Return where the whole model of an emulator is; None where the job has none, or its owner runs elsewhere.

    Args:
        job: The job.
        parties: The parties that run here.

    Raises:
        ConfigError: `BAD_COMBINATION`, the owner's party file does not say where the whole model is.
    """
    owner = getattr(job.federation, "owner", None)
    for located in parties:
        if located.party.name != owner:
            continue
        if located.party.emulator is None:
            what = f"party {owner} is the owner, and its party file does not say where the whole model is"
            fix = "write the section `emulator` with `full_model_name_or_path` into the owner's party.yaml"
            raise ConfigError("BAD_COMBINATION", what, where=f"party {owner}", fix=fix)
        return full_model(job, located, located.party.emulator)
    return None


def _owners_text(job: Job, parties: list[LocatedParty], base: Base) -> dict[str, Any]:
    """Return how an emulator is distilled further, and on what, where its owner runs here and the job asks for it."""
    owner = getattr(job.federation, "owner", None)
    located = next((located for located in parties if located.party.name == owner), None)
    if located is None or not getattr(job.federation, "realign_every", 0):
        return {}
    settings = located.party.emulator
    if settings is None or settings.public is None:
        what = f"party {owner} is to distil the emulator further, and its party file names no public text"
        fix = "write `public` into the section `emulator` of the owner's party.yaml, or leave `realign_every` out"
        raise ConfigError("BAD_COMBINATION", what, where=f"party {owner}", fix=fix)
    if not located.party.data.eval and not located.party.data.eval_share:
        what = "the probe set holds no examples out, and without them no policy can be kept to between rounds"
        fix = "set `data.eval` or `data.eval_share`"
        raise ConfigError("MISSING_KEY", what, where=f"party {owner}, data", fix=fix)
    examples = read_examples(settings.public, base_dir=located.base_dir, settings=job.data)
    public, _ = tokens_of(examples, base.tokenizer, job, where="emulator.public")
    return {"emulator": settings, "public": public}


def full_model(job: Job, located: LocatedParty, settings: EmulatorSettings) -> FullModel:
    """Return where the owner's whole model is.

    Args:
        job: The job.
        located: The owner's party file.
        settings: Its `emulator` section.
    """
    model = job.model.model_copy(update={"model_name_or_path": settings.full_model_name_or_path})
    folder = find_base(model, base_dir=located.base_dir)
    cut = Cut(settings.bottom, settings.top)
    return FullModel(folder, cut, job.model, job.peft, job.task, located.party.device)


def data_settings(job: Job) -> DataSettings:
    """Return the job's `data` section with absolute paths.

    Args:
        job: The job.
    """
    return job.data.with_base_dir(job.base_dir)


def common_examples(job: Job) -> tuple[Example, ...]:
    """Return the job's common test set; empty if it names none.

    Args:
        job: The job.
    """
    if job.evaluate.test is None:
        return ()
    found = read_examples(job.evaluate.test, base_dir=job.base_dir, settings=job.data)
    return found[: job.evaluate.max_examples]


def common_tokens(job: Job, base: Base) -> tuple[list[TokenisedExample], str]:
    """Return the common test set as tokens, and its SHA-256.

    Args:
        job: The job.
        base: For the tokenizer.
    """
    examples = common_examples(job)
    if not examples:
        return [], hashlib.sha256(b"").hexdigest()
    tokens, _ = tokens_of(examples, base.tokenizer, job, where="evaluate.test")
    digest = hashlib.sha256(repr([_content(example) for example in tokens]).encode()).hexdigest()
    return tokens, digest


def _content(example: TokenisedExample) -> object:
    return example.input_ids if example.label is None else (example.input_ids, example.label)


def tokens_of(
    examples: Sequence[Example], tokenizer: Any, job: Job, *, where: str
) -> tuple[list[TokenisedExample], TokenReport]:
    """Return examples as tokens, and counts; an error says whose they are.

    Args:
        examples: Any number of examples.
        tokenizer: The base model's tokenizer.
        job: For its `data` section.
        where: Whose examples they are, for the error.
    """
    try:
        return tokenise_all(examples, tokenizer, data_settings(job))
    except DataError as error:
        place = f"{where}, {error.where}" if error.where else where
        raise DataError(error.code, error.what, where=place, fix=error.fix) from None


def party_examples(job: Job, located: LocatedParty) -> PartyData:
    """Return a party's training and held-out examples as they are.

    Args:
        job: The job.
        located: The party.

    Raises:
        DataError: The data cannot be used as they are.
    """
    return read_party_data(
        located.party.data,
        base_dir=located.base_dir,
        settings=job.data,
        seed=job.seed,
        party=located.party.name,
    )


def party_tokens(site: Site, located: LocatedParty, *, read: PartyData | None = None) -> TokenData:
    """Return a party's training and held-out examples as tokens.

    Args:
        site: For the tokenizer and the job.
        located: The party.
        read: Its examples, where they are read already.

    Raises:
        DataError: The data cannot be used as they are.
    """
    job, tokenizer, where = site.job, site.base.tokenizer, f"party {located.party.name}"
    read = read or party_examples(job, located)
    train, _ = tokens_of(read.train, tokenizer, job, where=where)
    held_out, _ = tokens_of(read.held_out, tokenizer, job, where=f"{where}, held-out examples")
    return TokenData(train, held_out, site.common, read.digest)
