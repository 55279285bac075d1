"""Make the package that others get of an owner's model, and see that it keeps to the owner's export policy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from fedllm.data.read import read_examples
from fedllm.data.tokens import TokenisedExample
from fedllm.disk import disk_error
from fedllm.errors import ConfigError, EmulatorRefused, ModelError
from fedllm.job.job import Job, LocatedParty, load_parties, load_party
from fedllm.models.blocks import cuts_of
from fedllm.models.emulator import MEASURED_WAYS, middle_parameters, share_repeated, sliced
from fedllm.models.emulator_settings import EmulatorSettings
from fedllm.models.full import FullModel
from fedllm.models.load import Base, find_base, load_base
from fedllm.models.package import Made, package_tensors, read_note, write_package
from fedllm.models.scan import Match, matches, secret_tensors
from fedllm.runtime.emulator_check import Bench, Figures, Verdict, measure, verdict
from fedllm.runtime.site import data_settings, owners_model, party_examples, tokens_of
from fedllm.scenarios.base import TokenData
from fedllm.train.distil import Distillation, chosen, distil

Say = Callable[[str], None]


@dataclass(frozen=True)
class Owner:
    """The owner's side of a job of offsite tuning: its party file, and its whole model."""

    job: Job
    located: LocatedParty
    settings: EmulatorSettings
    full: FullModel


@dataclass(frozen=True)
class Report:
    """What `build` and `check` found.

    Args:
        package: The package's folder.
        figures: Losses of the models that are compared.
        verdict: What the export policy says of them.
        found: Blocks of the whole model that the package must not hold, and does.
    """

    package: Path
    figures: Figures
    verdict: Verdict
    found: tuple[Match, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "package": str(self.package),
            "losses_nats": self.figures.values(),
            "recovered": self.figures.recovered,
            "allowed": self.verdict.allowed and not self.found,
            "reasons": [*self.verdict.broken, *(f"{match.held} is {match.secret}" for match in self.found)],
        }


def owner_of(job: Job, parties: list[LocatedParty] | None = None) -> Owner:
    """Return the owner's side of a job.

    Args:
        job: Of the scenario FedOST.
        parties: The party files of this machine; by default those beside the job.

    Raises:
        ConfigError: `BAD_COMBINATION`, the job has no owner, or its party file no `emulator` section.
    """
    name = getattr(job.federation, "owner", None)
    if name is None:
        what = f"the job's scenario is {job.scenario}, in which no party keeps its model to itself"
        raise ConfigError("BAD_COMBINATION", what, where="scenario", fix="set `scenario: FedOST` and name the owner")
    located = next(located for located in parties or load_parties(job) if located.party.name == name)
    full, settings = owners_model(job, [located]), located.party.emulator
    assert full is not None and settings is not None  # noqa: S101
    return Owner(job, located, settings, full)


def owner_without_job(party_file: Path, *, output: Path, overrides: list[str]) -> Owner:
    """Return the owner's side where there is no job yet: what a job would say is as `assumed` shows.

    Args:
        party_file: The owner's own file.
        output: Where the package goes.
        overrides: `key.path=value` settings of the job that is assumed.

    Raises:
        ConfigError: A file is wrong, or `BAD_COMBINATION`: it does not say where the whole model is.
    """
    located = load_party(party_file)
    name = located.party.name
    filled = [f"federation.owner={name}", f"parties=[{name}, {'rest' if name == 'others' else 'others'}]"]
    filled.append(f"model.model_name_or_path={output.resolve()}")
    with as_file(files("fedllm") / "assets" / "emulator_job.yaml") as path:
        job = Job.from_yaml(path, overrides=[*filled, *overrides])
    return owner_of(job.located(located.base_dir), [located])


def assumed(job: Job) -> dict[str, Any]:
    """Return what a job that was assumed says and the check depends on.

    Args:
        job: The job.
    """
    train, told = job.train, ("learning_rate", "lr_scheduler_type", "per_device_train_batch_size")
    settings: dict[str, Any] = {f"train.{name}": getattr(train, name) for name in told}
    tuned = {f"peft.{name}": value for name, value in job.peft.model_dump(mode="json").items() if value}
    return tuned | settings | {"data.max_length": job.data.max_length, "seed": job.seed}


def build(owner: Owner, *, output: Path | None = None, say: Say = lambda text: None) -> Report:
    """Make the package, see that it keeps to the owner's policy, and only then write it to its place.

    Args:
        owner: The owner.
        output: Where it goes; by default where the job looks for its base model.
        say: Told what is being done.

    Raises:
        EmulatorRefused: `EMULATOR_REFUSED`, the package breaks the policy; nothing is written.
        ConfigError: `RUN_EXISTS`, the folder is in use.
    """
    output = output or owner.job.path(owner.job.model.model_name_or_path)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError("RUN_EXISTS", "the folder is not empty", where=str(output), fix="remove it, or name another")
    torch.set_num_threads(owner.job.runtime.num_threads)
    draft = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        made = make_package(owner, draft, say=say)
        report = replace(_checked(owner, draft, made.found, say=say), package=output)
        refuse(report)
        draft.replace(output)
    except OSError as error:
        raise disk_error(error, output) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return report


def check(owner: Owner, *, say: Say = lambda text: None) -> Report:
    """Return what the package that is there is worth, and what the policy says of it.

    Args:
        owner: The owner.
        say: Told what is being done.

    Raises:
        ModelError: There is no package, or it is of another model.
    """
    torch.set_num_threads(owner.job.runtime.num_threads)
    folder = find_base(owner.job.model, base_dir=owner.job.base_dir)
    read_note(folder)
    return _checked(owner, folder, _scanned(owner, folder), say=say)


def refuse(report: Report) -> None:
    """Raise where a package may not leave.

    Args:
        report: From `check`.

    Raises:
        EmulatorRefused: `EMULATOR_REFUSED`.
    """
    facts = report.to_json()
    if facts["allowed"]:
        return
    fix = "keep fewer blocks, distil less, or say in the policy that this is acceptable"
    if report.found:
        fix = "keep other blocks: these must not leave"
    what = "; ".join(facts["reasons"]) + " (E20)"
    raise EmulatorRefused("EMULATOR_REFUSED", what, where=str(report.package), fix=fix, report=facts)


@dataclass(frozen=True)
class Draft:
    """A package that was written, and what must not be in it."""

    folder: Path
    found: tuple[Match, ...]


def make_package(owner: Owner, folder: Path, *, say: Say = lambda text: None) -> Draft:
    """Write a package without asking the policy, and return it with what is in it of the blocks that are left out.

    Args:
        owner: The owner.
        folder: Where it goes.
        say: Told what is being done.
    """
    settings, job = owner.settings, owner.job
    base = owner.full.load()
    pad_id = base.tokenizer.pad_token_id
    public = public_tokens(owner, base) if settings.public else []
    if settings.way in MEASURED_WAYS:
        say("measuring blocks")
    slots = chosen(base.model, owner.full.cut, settings, public, pad_id=pad_id)
    model = sliced(base.model, slots, owner.full.cut)
    if settings.distil_steps:
        say(f"distilling, {settings.distil_steps} steps")
        share_repeated(model, slots)
        tuned = list(middle_parameters(model, owner.full.cut).values())
        how = Distillation(
            settings.distil_steps,
            settings.distil_learning_rate,
            settings.distil_batch_size,
            settings.hidden_weight,
            settings.logit_weight,
            owner.full.cut,
            job.seed,
        )
        distil(model, base.model, public, how=how, tuned=tuned, pad_id=pad_id)
    made = Made(model, base.tokenizer, owner.full.cut, settings.way, bool(settings.distil_steps))
    write_package(made, folder, storage=settings.storage)
    secret = secret_tensors(base.model, slots, owner.full.cut)
    allowed = {name: t for name, t in base.model.state_dict().items() if name not in secret}
    return Draft(folder, tuple(matches(package_tensors(folder), secret, allowed=allowed)))


def public_tokens(owner: Owner, base: Base) -> list[TokenisedExample]:
    """Return the owner's public text as tokens.

    Args:
        owner: The owner.
        base: For the tokenizer.
    """
    name = owner.settings.public or ""
    examples = read_examples(name, base_dir=owner.located.base_dir, settings=owner.job.data)
    return tokens_of(examples, base.tokenizer, owner.job, where="emulator.public")[0]


def _scanned(owner: Owner, folder: Path) -> tuple[Match, ...]:
    """Return what a package holds of blocks that its own choice leaves out; the choice is taken to be as configured.

    Which blocks stand in a package is known from its tensors: those that are equal to a block of the whole model.
    """
    base, settings = owner.full.load(), owner.settings
    public = public_tokens(owner, base) if settings.public else []
    slots = chosen(base.model, owner.full.cut, settings, public, pad_id=base.tokenizer.pad_token_id)
    secret = secret_tensors(base.model, slots, owner.full.cut)
    allowed = {name: t for name, t in base.model.state_dict().items() if name not in secret}
    return tuple(matches(package_tensors(folder), secret, allowed=allowed))


def _checked(owner: Owner, folder: Path, found: Sequence[Match], *, say: Say) -> Report:
    bench = open_bench(owner, folder, say=say)
    figures = measure(bench)
    return Report(folder, figures, verdict(figures, owner.settings.policy), tuple(found))


def open_bench(owner: Owner, folder: Path, *, say: Say = lambda text: None) -> Bench:
    """Return what the models are measured with.

    Args:
        owner: The owner.
        folder: A package.
        say: Told what is being done.

    Raises:
        ModelError: `MODEL_MISMATCH`, the package is of another model.
    """
    job = owner.job
    settings = job.model.model_copy(update={"base_digest": None})
    package = load_base(settings, folder=folder, device=owner.located.party.device, task=job.task)
    cuts = cuts_of(package.model.config)
    if set(cuts.values()) != {owner.full.cut}:
        what = "the package is cut otherwise than the owner's party file says"
        raise ModelError("MODEL_MISMATCH", what, where="emulator", fix="build it again with `fedllm emulator build`")
    owner.full.check_package(package.model)
    read, where = party_examples(job, owner.located), f"party {owner.located.party.name}"
    probe = TokenData(
        tokens_of(read.train, package.tokenizer, job, where=where)[0],
        tokens_of(read.held_out, package.tokenizer, job, where=where)[0] if read.held_out else [],
        [],
    )
    public = public_tokens(owner, package) if owner.settings.public else []
    return Bench(
        job=job,
        settings=owner.settings,
        package=package,
        full=owner.full,
        probe=probe,
        public=public or probe.train,
        data_settings=data_settings(job),
        say=say,
    )
