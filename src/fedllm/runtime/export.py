"""Export a run's adapter, alone or merged into its base model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from fedllm.disk import disk_error
from fedllm.errors import ConfigError
from fedllm.job.job import Job
from fedllm.models.deliver import WEIGHTS, merged
from fedllm.models.load import load_base
from fedllm.runs.plan_files import read_plan
from fedllm.runtime.delivery import COPY, need_adapter, own_adapters
from fedllm.runtime.site import base_folder


def export(run: Path, output: Path, *, merge: bool, party: str | None = None) -> Path:
    """Return the folder with the exported model.

    Args:
        run: The run folder.
        output: A folder that is absent or empty.
        merge: Merge the adapter into the base model; else copy the adapter.
        party: Whose adapter, where each party has its own, or whose copy.

    Raises:
        ConfigError: `RUN_UNFINISHED`, `RUN_EXISTS`, `BAD_COMBINATION` where the method cannot be merged, or
            `BAD_VALUE`: the run has no adapter of that party, or only such.
    """
    job, parties = read_plan(run)
    need_adapter(run, job)
    adapter = _adapter(run, job, party)
    if not (adapter / WEIGHTS).is_file():
        raise ConfigError(
            "RUN_UNFINISHED",
            "the run has no adapter yet",
            where=str(run),
            fix=f"`fedllm resume {run}` goes on with it",
        )
    if output.exists() and any(output.iterdir()):
        raise ConfigError("RUN_EXISTS", "the folder is not empty", where=str(output), fix="name a new folder")
    try:
        if not merge:
            shutil.copytree(adapter, output, dirs_exist_ok=True)
            return output
        torch.set_num_threads(job.runtime.num_threads)
        folder, device = base_folder(job, parties)
        # Into the whole weights: a quantised base would lose a part of what was learnt.
        model = job.model.model_copy(update={"load_in_8bit": False, "load_in_4bit": False})
        base = load_base(model, folder=folder, device=device, task=job.task)
        merged(base.model, adapter).save_pretrained(output)
        base.tokenizer.save_pretrained(output)
        shutil.copyfile(adapter / "README.md", output / "README.md")
    except OSError as error:
        raise disk_error(error, output) from None
    return output


def _adapter(run: Path, job: Job, party: str | None) -> Path:
    found, copy = own_adapters(run, job), run / "parties" / (party or "") / COPY
    if party is not None and party in found:
        return found[party]
    if party in job.parties and (copy / WEIGHTS).is_file():
        return copy
    if party is None and not found:
        return run / "adapter"
    if found:
        what = "there is no adapter for all: each party has its own" if party is None else f"{party!r} has none here"
        raise ConfigError("BAD_VALUE", what, where="--party", fix=f"name one of: {', '.join(found)}")
    raise ConfigError(
        "BAD_VALUE", "the run has one adapter for all, or is not finished", where="--party", fix="leave `--party` out"
    )
