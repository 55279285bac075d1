"""Export a run's adapter, alone or merged into its base model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from fedllm.disk import disk_error
from fedllm.errors import ConfigError
from fedllm.models.deliver import WEIGHTS, merged
from fedllm.models.load import load_base
from fedllm.runs.plan_files import read_plan
from fedllm.runtime.site import base_folder


def export(run: Path, output: Path, *, merge: bool) -> Path:
    """Return the folder with the exported model.

    Args:
        run: The run folder.
        output: A folder that is absent or empty.
        merge: Merge the adapter into the base model; else copy the adapter.

    Raises:
        ConfigError: `RUN_UNFINISHED`, `RUN_EXISTS`, or `BAD_COMBINATION` where the method cannot be merged.
    """
    job, parties = read_plan(run)
    adapter = run / "adapter"
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
