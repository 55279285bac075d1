"""Write a job folder that runs as it is: commented files, sample data and the small base model.

A recipe is a folder of `assets/recipes`: `job.yaml`, and `party.yaml`, which each party gets with its name in it. Files
of its own that a recipe has beside these two are copied as they are, over the demo's.
"""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path

from fedllm.disk import disk_error
from fedllm.errors import ConfigError, nearest

PARTIES = ("north", "east", "south")
# Recipe -> what it is, for the help.
RECIPES: dict[str, str] = {
    "fedavg": "one LoRA adapter, tuned together by federated averaging",
    "ownership": "the same, with secret marks by which each party can show that the model is theirs",
    "offsite": "the outer layers of an emulator, whose owner keeps the whole model",
}
# Recipe -> what comes before the run, with the job's path.
FIRST: dict[str, str] = {"ownership": "fedllm ownership commit {job}", "offsite": "fedllm emulator build {job}"}
# Recipes that bring a base model and data of their own.
_WITH_BASE = ("offsite",)
_TEMPLATES = ("job.yaml", "party.yaml")


def write_job_folder(folder: Path, recipe: str = "fedavg") -> Path:
    """Return the path of a new, commented job.yaml with everything that it names.

    Args:
        folder: A folder that is absent or empty.
        recipe: One of `RECIPES`.

    Raises:
        ConfigError: `RUN_EXISTS`, the folder is not empty; `BAD_VALUE`, no such recipe.
    """
    if recipe not in RECIPES:
        raise ConfigError("BAD_VALUE", f"there is no recipe `{recipe}`", where="--recipe", fix=nearest(recipe, RECIPES))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("RUN_EXISTS", "the folder is not empty", where=str(folder), fix="name a new folder")
    try:
        with as_file(files("fedllm") / "assets") as assets:
            _copy(assets, folder, recipe)
    except OSError as error:
        raise disk_error(error, folder) from None
    return folder / "job.yaml"


def _copy(assets: Path, folder: Path, recipe: str) -> None:
    own = assets / "recipes" / recipe
    (folder / "parties").mkdir(parents=True)
    if recipe not in _WITH_BASE:
        shutil.copytree(assets / "demo" / "base", folder / "base")
        shutil.copytree(assets / "demo" / "data", folder / "data")
    shutil.copyfile(own / "job.yaml", folder / "job.yaml")
    template = (own / "party.yaml").read_text(encoding="utf-8")
    for name in PARTIES:
        (folder / "parties" / f"{name}.yaml").write_text(template.format(name=name), encoding="utf-8")
    for path in sorted(own.iterdir()):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif path.name not in _TEMPLATES:
            shutil.copyfile(path, folder / path.name)
