"""The package that others get of an owner's model: a plain model folder with an emulated middle, and `emulator.json`.

The matrices of the middle can be stored in 8 or 4 bits: then they are in `middle.safetensors`, blocks of 64 values with
a scale each, and `fedllm.models.load.load_base` fills them in. Others have their places in `model.safetensors`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fedllm.errors import ModelError
from fedllm.models.blocks import Cut, stacks
from fedllm.models.digest import file_digest
from fedllm.models.emulator import middle_parameters
from fedllm.models.emulator_settings import Storage
from fedllm.models.quiet import no_progress_bar
from fedllm.wire.codecs import Codec, CodecSettings
from fedllm.wire.payload import Tensors, manifest_of

NOTE, MIDDLE = "emulator.json", "middle.safetensors"
_CODECS = ("int8", "int4")


@dataclass(frozen=True)
class Made:
    """An emulator with what its package says of it. Nothing here tells of the blocks that are left out.

    Args:
        model: From `sliced`.
        tokenizer: The owner's.
        cut: Bottom and top.
        way: How blocks were chosen.
        distilled: Whether the middle was distilled.
    """

    model: Any
    tokenizer: Any
    cut: Cut
    way: str
    distilled: bool


def write_package(made: Made, folder: Path, *, storage: Storage) -> Path:
    """Write a package into a folder, and return it.

    Args:
        made: What goes into it.
        folder: Absent or empty.
        storage: How the matrices of the middle are stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = made.model
    model.config._name_or_path = ""
    state = dict(model.state_dict())
    if storage in _CODECS:
        matrices = {name: state[name] for name, p in middle_parameters(model, made.cut).items() if p.dim() > 1}
        state = {name: tensor for name, tensor in state.items() if name not in matrices}
        save_file(_codec(storage).encode(matrices, seed=0, party="", number=0), folder / MIDDLE, {"storage": storage})
    with no_progress_bar():
        model.save_pretrained(folder, state_dict=_unshared(state))
    made.tokenizer.save_pretrained(folder)
    note = {
        "layout": 1,
        "way": made.way,
        "distilled": made.distilled,
        "storage": storage,
        "blocks": {
            path: {"bottom": made.cut.bottom, "middle": len(b) - made.cut.bottom - made.cut.top, "top": made.cut.top}
            for path, b in stacks(model).items()
        },
        "files": {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))},
    }
    (folder / NOTE).write_text(json.dumps(note, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def read_note(folder: Path) -> dict[str, Any]:
    """Return what a package says of itself.

    Args:
        folder: The package.

    Raises:
        ModelError: `MODEL_NOT_FOUND`, the folder is no package.
    """
    try:
        found = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("blocks"), dict):
        what = f"{folder} is no emulator's package: it has no {NOTE}"
        fix = "the model's owner makes one with `fedllm emulator build JOB`"
        raise ModelError("MODEL_NOT_FOUND", what, where="model.model_name_or_path", fix=fix)
    return found


def fill_middle(model: torch.nn.Module, folder: Path, missing: set[str]) -> set[str]:
    """Fill in what a package stores in 8 or 4 bits, and return the names.

    Args:
        model: As transformers loaded it.
        folder: Its folder.
        missing: What transformers did not find there.

    Raises:
        ModelError: `MODEL_NOT_FOUND`, the file is damaged, or is for another model.
    """
    path = folder / MIDDLE
    if not path.is_file() or not missing:
        return set()
    parameters = dict(model.named_parameters())
    wanted = {name: parameters[name] for name in sorted(missing) if name in parameters}
    manifest = manifest_of({name: torch.empty(p.shape, device="meta") for name, p in wanted.items()})
    try:
        with safe_open(path, framework="pt") as file:
            storage = (file.metadata() or {}).get("storage", "")
        if storage not in _CODECS:
            raise KeyError(storage)
        codec, parts = _codec(storage), load_file(path)
        if {name: (t.dtype, list(t.shape)) for name, t in parts.items()} != {
            name: (getattr(torch, spec.dtype), list(spec.shape)) for name, spec in codec.manifest(manifest).items()
        }:
            raise KeyError("shapes")
    except (KeyError, SafetensorError, OSError):
        what = f"{path} is damaged, or belongs to another model"
        fix = "copy the package again, whole"
        raise ModelError("MODEL_NOT_FOUND", what, where="model.model_name_or_path", fix=fix) from None
    decoded = codec.decode(parts, manifest, seed=0, number=0)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(decoded[name])
    return set(wanted)


def package_tensors(folder: Path) -> Tensors:
    """Return all tensors in the files of a model folder as they are stored, each under its file's name and its own.

    Args:
        folder: The folder, with those below it.
    """
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{path.relative_to(folder)}:{name}": t for path in files for name, t in load_file(path).items()}


def _codec(storage: str) -> Codec:
    # To the nearest: nothing is drawn.
    return Codec(CodecSettings.model_validate({"name": storage, "block_size": 64, "error_feedback": True}))


def _unshared(state: Tensors) -> Tensors:
    """Return a state in which blocks do not share tensors; of tied embeddings transformers takes care."""
    seen: set[int] = set()
    found: Tensors = {}
    for name, tensor in state.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen and ".weight" in name and _in_block(name) else tensor
        seen.add(tensor.data_ptr())
    return found


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))
