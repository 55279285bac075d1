"""What a run delivers, as folders in PEFT's layout: one adapter for all, or each party's own at the party."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm.aggregate.folded import FOLDED, added_sites, complete
from fedllm.aggregate.lora import sites
from fedllm.aggregate.slots import num_slots
from fedllm.disk import disk_error, write_atomic
from fedllm.errors import ConfigError, ModelError, PayloadError
from fedllm.job.job import Job
from fedllm.models.adapter import skeleton
from fedllm.models.blocks import forget_cuts
from fedllm.models.deliver import WEIGHTS, merged_in_memory, save_adapter, save_tuned
from fedllm.models.quiet import no_progress_bar
from fedllm.models.settings import PeftSettings
from fedllm.runs.card import copy_card, own_card
from fedllm.wire.frame import check_finite
from fedllm.wire.payload import Tensors, manifest_of

if TYPE_CHECKING:
    from fedllm.runs.folder import RunFolder
    from fedllm.runtime.site import Site

# A party's own copy of the adapter that all tuned, beside what else is its own.
COPY = "copy"
# What PEFT puts before the names of a model's modules.
_WRAPPED = "base_model.model."


# What the owner of an emulator's whole model gets: its folder beside what else the party keeps of the run.
OWNERS_MODEL = "model"


def write_adapter(tensors: Tensors, folder: Path, *, job: Job, base: Path, card: str = "") -> Path:
    """Write an adapter into a folder, in place of what is there, and return the file of its tensors.

    Args:
        tensors: The adapter, by parameter name.
        folder: Where it goes.
        job: The job.
        base: The base model's folder; only its config is read.
        card: Its README.md; by default none is written.

    Raises:
        ResourceError: `DISK_FULL`.
    """
    draft = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        adapter, peft = dict(tensors), job.peft
        if any(name.startswith(FOLDED) for name in tensors):
            adapter = complete(tensors)
            peft = of_rank(peft, num_slots(manifest_of(adapter)))
        if added_sites(tensors):
            # An emulator's middle was corrected: the adapter reaches further than what was tuned.
            modules = [site.removeprefix(_WRAPPED) for site in sites(adapter)]
            wide = skeleton(base, peft.model_copy(update={"target_modules": modules}), job.task, all_layers=True)
            save_tuned(adapter, wide, folder=draft, name=job.model.model_name_or_path, task=job.task)
        else:
            save_adapter(adapter, folder=draft, base=base, peft=peft, name=job.model.model_name_or_path, task=job.task)
        if card:
            write_atomic(draft / "README.md", card.encode())
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    except OSError as error:
        raise disk_error(error, folder) from None
    return folder / WEIGHTS


def deliver_own(site: Site, run: RunFolder, party: str, tensors: Tensors) -> None:
    """Write a party's own adapter, which no other party and no server holds, into its folder of the run.

    Args:
        site: For the job and the base model's config.
        run: The run folder at the party.
        party: The party.
        tensors: Its adapter.
    """
    job = site.job
    if party == getattr(job.federation, "owner", None):
        deliver_to_owner(site, run, party, tensors)
        return
    folder = own_adapter(run.path, party)
    card = own_card(job.name, site.folder.name, job.task, hides=job.privacy.differential_privacy.unit)
    write_adapter(tensors, folder, job=job, base=site.folder, card=card)


def write_copy(site: Site, run: RunFolder, party: str, tensors: Tensors) -> None:
    """Write a party's own copy of the adapter that all tuned into `parties/NAME/copy` of its run folder.

    Args:
        site: For the job, the base model's config, and what an adapter is made of.
        run: The run folder at the party.
        party: The party.
        tensors: The copy; its rank may be another than the job's.

    Raises:
        PayloadError: `PAYLOAD_REFUSED` or `NONFINITE`, it is no adapter of the job.
    """
    found, expected = manifest_of(tensors), site.model.manifest
    rank = num_slots(found) if found else 0
    job = site.job.model_copy(update={"peft": of_rank(site.job.peft, rank)})
    factor = {".lora_A.": 0, ".lora_B.": 1}
    for name, spec in expected.items():
        axis = next((axis for part, axis in factor.items() if part in name), None)
        shape = [rank if place == axis else size for place, size in enumerate(spec.shape)]
        if name not in found or list(found[name].shape) != shape:
            raise PayloadError("PAYLOAD_REFUSED", "the copy is not an adapter of the job", where=f"party {party}")
    check_finite(tensors, sender="server")
    card = copy_card(job.name, site.folder.name, job.task)
    kept = {name: tensors[name] for name in expected}
    write_adapter(kept, run.path / "parties" / party / COPY, job=job, base=site.folder, card=card)


def deliver_to_owner(site: Site, run: RunFolder, party: str, tensors: Tensors) -> None:
    """Write what the owner of an emulator's whole model gets: that model with the outer layers that others tuned.

    Args:
        site: With the whole model, and the emulator.
        run: The run folder at the owner.
        party: The owner.
        tensors: What was tuned on the emulator.

    Raises:
        ModelError: `MODEL_NOT_FOUND`, the whole model is not here.
        ResourceError: `DISK_FULL`.
    """
    job, full = site.job, site.full
    if full is None:
        raise ModelError("MODEL_NOT_FOUND", "the whole model is not at this site", where=f"party {party}")
    as_model = job.federation.model_dump()["deliver_to_owner"] == "model"
    folder = run.path / "parties" / party / (OWNERS_MODEL if as_model else "adapter")
    draft = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with full.plugged(tensors, site.model.model) as tunable:
            if as_model:
                model = merged_in_memory(tunable.model, job.peft)
                forget_cuts(model.config)
                with no_progress_bar():
                    model.save_pretrained(draft)
                site.base.tokenizer.save_pretrained(draft)
            else:
                save_tuned(tunable.read(), tunable, folder=draft, name=full.folder.name, task=job.task)
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    except OSError as error:
        raise disk_error(error, folder) from None


def own_adapter(run: Path, party: str) -> Path:
    """Return the folder of a party's own adapter.

    Args:
        run: The run folder.
        party: The party.
    """
    return run / "parties" / party / "adapter"


def own_adapters(run: Path, job: Job) -> dict[str, Path]:
    """Return the parties' own adapters that are on this machine, by party; none where one adapter is delivered to all.

    Args:
        run: The run folder.
        job: Its job.
    """
    if (run / "adapter" / WEIGHTS).is_file():
        return {}
    folders = {party: own_adapter(run, party) for party in job.trainers}
    return {party: folder for party, folder in folders.items() if (folder / WEIGHTS).is_file()}


def whereabouts(run: Path, job: Job) -> str:
    """Return who has what of a run, and where; empty where one adapter is delivered to all, or each party has its own.

    Args:
        run: The run folder.
        job: Its job.
    """
    if getattr(job.federation, "deliver_to_clients", "adapter") == "adapter":
        return ""
    told, owner = job.table_line().delivered(job.federation), job.federation.model_dump()["owner"]
    name = OWNERS_MODEL if job.federation.model_dump()["deliver_to_owner"] == "model" else "adapter"
    folder = run / "parties" / owner / name
    place = f"in {folder}" if folder.is_dir() else f"at the owner's site, in parties/{owner}/{name} of the run folder"
    return f"{told} That is {place}."


def need_adapter(run: Path, job: Job) -> None:
    """Raise where a job leaves no adapter for the base model, so that there is nothing to judge or to take away.

    Args:
        run: The run folder.
        job: Its job.

    Raises:
        ConfigError: `BAD_COMBINATION`.
    """
    if where := whereabouts(run, job):
        what = f"the run leaves no adapter for its base model. {where}"
        fix = f"the owner's model loads with from_pretrained; `fedllm report {run}` has the losses of both"
        raise ConfigError("BAD_COMBINATION", what, where="federation.deliver_to_clients", fix=fix)


def of_rank(peft: PeftSettings, rank: int) -> PeftSettings:
    """Return the settings of an adapter of another rank with the same scale.

    Args:
        peft: The job's.
        rank: The adapter's.
    """
    share = rank / (peft.r or rank)
    alpha = (peft.lora_alpha or 0.0) * (share**0.5 if peft.use_rslora else share)
    return peft.model_copy(update={"r": rank, "lora_alpha": alpha})
