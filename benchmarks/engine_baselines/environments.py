"""One virtual environment for each engine, so that neither's requirements decide the other's versions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

# Flower 1.42.0 asks for a release of certifi that may not be there yet; 1.41.0 takes as long a round.
REQUIREMENTS = {
    "flare": ["nvflare==2.9.*", "numpy"],
    "flower": ["flwr==1.41.0", "numpy"],
    "tenseal": ["tenseal==0.3.*", "numpy"],
}
SHOWN = {"flare": "nvflare", "flower": "flwr", "tenseal": "tenseal"}


def make_environments(folder: Path, names: Sequence[str] = ("flare", "flower")) -> None:
    """Make the engines' virtual environments; pip's own settings say where packages come from.

    Args:
        folder: Where they go; an environment that stands there already is completed, not made anew.
        names: Of which engines.
    """
    # FLARE's FedAvg recipe for models of many tensors is the one for PyTorch: the same release as this environment's.
    torch = f"torch=={version('torch').split('+')[0]}"
    for name in names:
        wanted = REQUIREMENTS[name]
        packages = [*wanted, torch] if name == "flare" else wanted
        print(f"{folder / name}: {', '.join(packages)}", flush=True)
        if not python_of(folder, name).exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True, timeout=120)
        install = [str(python_of(folder, name)), "-m", "pip", "install", "-qq", *packages]
        subprocess.run(install, check=True, timeout=3600)


def python_of(folder: Path, name: str) -> Path:
    """Return the interpreter of an engine's environment.

    Args:
        folder: The environments' folder.
        name: flare or flower.
    """
    return folder.absolute() / name / "bin" / "python"


def versions(folder: Path, name: str) -> str:
    """Return the engine's name and version as they stand in its environment.

    Args:
        folder: The environments' folder.
        name: flare or flower.

    Raises:
        SystemExit: The environment isn't there.
    """
    python = python_of(folder, name)
    if not python.exists():
        raise SystemExit(f"{python} is missing; make it: python benchmarks/engine.py --make-environments {folder}")
    code = f"from importlib.metadata import version as v; print('{SHOWN[name]}', v('{SHOWN[name]}'))"
    shown = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True, timeout=60)
    return shown.stdout.strip()
