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
from fedllm.errors import ConfigError, DataError
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
    model has its claim. `full` is the whole model of an emulator, where its owner runs here.
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


def base_folder(job: Job, parties: list[LocatedParty]) -> tuple[Path, str]:
    """Return the folder of the base model, and the device, that all parties on this machine share.

    Args:
        job: The job.
        parties: The parties that run here.

    Raises:
        ConfigError: `BAD_COMBINATION` when parties on one machine name different folders or devices.
    """
    found = {
        find_base(job.model, base_dir=located.base_dir, override=located.party.model_name_or_path)
        if located.party.model_name_or_path
        else find_base(job.model, base_dir=job.base_dir)
        for located in parties
    }
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
    return TokenData(train, held_out, site.common)
