"""Write a job folder that runs as it is: commented files, sample data and the small base model."""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path

from fedllm.disk import disk_error
from fedllm.errors import ConfigError

PARTIES = ("north", "east", "south")


def write_job_folder(folder: Path) -> Path:
    """Return the path of a new, commented job.yaml with everything that it names.

    Args:
        folder: A folder that is absent or empty.

    Raises:
        ConfigError: `RUN_EXISTS`, the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("RUN_EXISTS", "the folder is not empty", where=str(folder), fix="name a new folder")
    try:
        with as_file(files("fedllm") / "assets") as assets:
            _copy(assets, folder)
    except OSError as error:
        raise disk_error(error, folder) from None
    return folder / "job.yaml"


def _copy(assets: Path, folder: Path) -> None:
    shutil.copytree(assets / "demo" / "base", folder / "base")
    shutil.copytree(assets / "demo" / "data", folder / "data")
    (folder / "parties").mkdir()
    shutil.copyfile(assets / "init" / "job.yaml", folder / "job.yaml")
    template = (assets / "init" / "party.yaml").read_text(encoding="utf-8")
    for name in PARTIES:
        (folder / "parties" / f"{name}.yaml").write_text(template.format(name=name), encoding="utf-8")
