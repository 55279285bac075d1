"""Write what was tuned: in PEFT's layout, or in a like one for the methods that PEFT has not; load and merge it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedllm.errors import ConfigError, ModelError
from fedllm.models.adapter import TunableModel, skeleton
from fedllm.models.blocks import CUT_KEY
from fedllm.models.methods import quiet_peft
from fedllm.models.settings import MERGING_TYPES, OWN_TYPES, PROMPT_TYPES, PeftSettings
from fedllm.tasks import LANGUAGE, Task
from fedllm.wire.payload import Tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(
    tensors: Mapping[str, torch.Tensor],
    *,
    folder: Path,
    base: Path,
    peft: PeftSettings,
    name: str,
    task: Task = LANGUAGE,
) -> None:
    """Write an adapter in PEFT's layout, which `PeftModel.from_pretrained` and `load_adapter` read.

    BOTTLENECK, BITFIT and FULL, which PEFT has not, are written under their parameters' names; `load_adapter` reads
    those, and `fedllm export --merge` makes a plain model of BITFIT and FULL.

    Args:
        tensors: What was tuned, by parameter name.
        folder: Where `adapter_model.safetensors` and `adapter_config.json` go.
        base: The base model's folder; only its config is read.
        peft: The tuning method.
        name: What the adapter's config calls the base model.
        task: What the model is tuned to do.
    """
    save_tuned(tensors, skeleton(base, peft, task), folder=folder, name=name, task=task)


def save_tuned(
    tensors: Mapping[str, torch.Tensor], tunable: TunableModel, *, folder: Path, name: str, task: Task = LANGUAGE
) -> None:
    """Write an adapter as `save_adapter` does, for a model that is there already, or its skeleton.

    Args:
        tensors: What was tuned, by parameter name.
        tunable: The model that they are for.
        folder: Where they go.
        name: What the adapter's config calls the base model.
        task: What the model is tuned to do.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    peft = tunable.peft
    if peft.peft_type in OWN_TYPES:
        state = dict(tensors)
        config: dict[str, Any] = {
            "library": "fedllm",
            "task": task.name,
            **peft.model_dump(mode="json", exclude_none=True),
        }
        if cuts := getattr(tunable.model.config, CUT_KEY, None):
            config[CUT_KEY] = cuts
        (folder / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": name}), encoding="utf-8")
    else:
        with quiet_peft():
            state = _peft_state(tunable, tensors)
        found = tunable.model.peft_config["default"]
        found.base_model_name_or_path = name
        found.inference_mode = True
        found.save_pretrained(str(folder))
    _sort_config(folder / CONFIG)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / WEIGHTS, {"format": "pt"})


def _peft_state(tunable: TunableModel, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    from peft import get_peft_model_state_dict

    if tunable.peft.peft_type in PROMPT_TYPES:
        return _prompt_state(tunable, tensors)
    full = dict.fromkeys(tunable.model.state_dict(), None) | dict(tensors)
    kept = {key: value for key, value in full.items() if value is not None}
    state: Tensors = get_peft_model_state_dict(tunable.model, state_dict=kept, save_embedding_layers=False)
    return {key: value for key, value in state.items() if value is not None}


def _prompt_state(tunable: TunableModel, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return the virtual tokens that the trained network makes, and a classifier's head.

    PEFT keeps the network's input and loses the network (P-tuning), or cannot load what it saved (prefix projection).
    """
    encoder = tunable.model.prompt_encoder["default"].to_empty(device="cpu")
    prefix = "prompt_encoder.default."
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    encoder.load_state_dict(own)
    tokens = torch.arange(encoder.embedding.num_embeddings).unsqueeze(0)
    with torch.no_grad():
        virtual: torch.Tensor = encoder(tokens)[0]
    head = {
        name.replace(".modules_to_save.default.", "."): value
        for name, value in tensors.items()
        if not name.startswith(prefix)
    }
    return {"prompt_embeddings": virtual.detach().clone(), **head}


def load_adapter(base_model: Any, folder: str | Path) -> Any:
    """Return a base model with a delivered adapter on it, of any method, frozen and in evaluation mode.

    Args:
        base_model: The model that it was tuned for, from `from_pretrained` of transformers.
        folder: Where `save_adapter` wrote it.

    Raises:
        ModelError: `PEFT_TARGET`, the adapter does not fit the model.
    """
    from peft import PeftModel
    from safetensors.torch import load_file

    found = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    if found.get("library") != "fedllm":
        with quiet_peft():
            return PeftModel.from_pretrained(base_model, str(folder)).requires_grad_(False).eval()
    if CUT_KEY in found:
        setattr(base_model.config, CUT_KEY, found[CUT_KEY])
    peft = PeftSettings.model_validate({key: value for key, value in found.items() if key in PeftSettings.model_fields})
    tunable = TunableModel(base_model.requires_grad_(False), peft, found["task"])
    tensors = load_file(Path(folder) / WEIGHTS)
    if missing := tensors.keys() ^ tunable.manifest.keys():
        raise ModelError(
            "PEFT_TARGET",
            f"the adapter and the base model differ in {len(missing)} tensors, such as {min(missing)}",
            where=str(folder),
            fix="load it on the base model that it was tuned for",
        )
    tunable.write(tensors)
    return tunable.model.requires_grad_(False).eval()


def read_adapter(model: TunableModel, folder: Path) -> Tensors:
    """Return the tensors of a delivered LoRA adapter by parameter name. The model holds them afterwards.

    Args:
        model: A model with an adapter of the same kind and sizes.
        folder: Where `save_adapter` wrote it.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model.model, load_file(folder / WEIGHTS))
    return model.read()


def merged(base_model: Any, folder: str | Path) -> Any:
    """Return a plain transformers model that computes what the base model with a delivered adapter computes.

    Args:
        base_model: As for `load_adapter`.
        folder: Where `save_adapter` wrote it.

    Raises:
        ConfigError: `BAD_COMBINATION`, the method adds something that is no part of the weights.
    """
    found = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    if found["peft_type"] not in MERGING_TYPES:
        raise ConfigError(
            "BAD_COMBINATION",
            f"what {found['peft_type']} adds cannot be written into the base model's weights",
            where=str(folder),
            fix="export without --merge, and load it with `fedllm.load_adapter`",
        )
    model = load_adapter(base_model, folder)
    return model if found.get("library") == "fedllm" else _unwrapped(model).merge_and_unload()


def merged_in_memory(model: Any, peft: PeftSettings) -> Any:
    """Return a plain model with what was tuned on it written into its weights.

    Args:
        model: Of a `TunableModel`; it cannot be used otherwise afterwards.
        peft: The tuning method, one of `MERGING_TYPES`.
    """
    return model if peft.peft_type in OWN_TYPES else _unwrapped(model).merge_and_unload()


def _unwrapped(model: Any) -> Any:
    """Put modules that were trained in full into the places of the old ones.

    PEFT does so itself where such a module is one layer; with VeRA and IA3 it fails on a head of several.
    """
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save["default"])
    return model


def _sort_config(path: Path) -> None:
    # PEFT keeps target_modules in a set, whose order changes from process to process.
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = sorted(value, key=str)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
