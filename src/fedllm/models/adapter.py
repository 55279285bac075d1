"""Attach a tuning method to a base model; read, write and save its parameters by name."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedllm.errors import ModelError
from fedllm.models.branch import set_folded
from fedllm.models.settings import PeftSettings
from fedllm.seeds import global_generators_kept, stream
from fedllm.wire.payload import Manifest, Tensors, TensorSpec, manifest_of

_RANDOM_UNIFORM = re.compile(r"\.lora_A\.")
_RANDOM_NORMAL = re.compile(r"\.lora_embedding_B\.")
_DRAWN = re.compile(r"\.lora_(A|B|embedding_A|embedding_B)\.")


class TunableModel:
    """A frozen base model with one adapter whose values are swapped in place.

    All parties in a process share it: what belongs to a party is only the values of `trainable`. Parameters are
    exchanged by name because PEFT's own state dict loses or resizes some of them (P-tuning, prefix projection).
    """

    def __init__(self, base_model: Any, peft: PeftSettings) -> None:
        self.model = _attach(base_model, peft)
        self.trainable: dict[str, torch.nn.Parameter] = {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }
        self.manifest: Manifest = manifest_of(self.trainable)
        # What PEFT computed from the base. Kept, because one model may serve several runs, each from its start.
        self._given = {
            name: parameter.detach().clone() for name, parameter in self.trainable.items() if not _DRAWN.search(name)
        }

    def read(self) -> Tensors:
        """Return copies of the trainable tensors on the CPU, by name."""
        return {name: self.trainable[name].detach().to("cpu", copy=True) for name in self.manifest}

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the trainable tensors in place, and what stands beside them (`folded/...`); names are of `manifest`."""
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[name])
        set_folded(self.model, tensors)

    @contextmanager
    def only(self, names: Iterable[str]) -> Iterator[None]:
        """Train these tensors and no others, for as long as the context lasts.

        Args:
            names: Out of `manifest`.
        """
        fixed = [self.trainable[name] for name in self.trainable.keys() - set(names)]
        for parameter in fixed:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in fixed:
                parameter.requires_grad_(True)

    def initial(self, seed: int) -> Tensors:
        """Return the adapter's first values, drawn from the job's seed alone.

        LoRA's A is Kaiming-uniform, +-1/sqrt(fan_in), as PEFT draws it, but from a counter-based generator, so
        that machines and library versions agree. What PEFT computes from the base (DoRA's magnitudes, modules to
        save) is kept.

        Args:
            seed: The job's seed.
        """
        return {
            name: self._given[name].to("cpu", copy=True) if name in self._given else _first_value(name, spec, seed)
            for name, spec in self.manifest.items()
        }

    def num_trainable(self) -> int:
        """Return how many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trainable.values())


def _first_value(name: str, spec: TensorSpec, seed: int) -> torch.Tensor:
    draw = stream(seed, "initial", name)
    value = spec.zeros()
    if _RANDOM_UNIFORM.search(name):
        bound = math.prod(spec.shape[1:]) ** -0.5
        value = torch.from_numpy(draw.uniform(-bound, bound, tuple(spec.shape))).to(value.dtype)
    elif _RANDOM_NORMAL.search(name):
        value = torch.from_numpy(draw.standard_normal(tuple(spec.shape))).to(value.dtype)
    return value


def _attach(base_model: Any, peft: PeftSettings) -> Any:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in base_model.modules()):
        raise ModelError(
            "PEFT_TARGET",
            "the base model carries an adapter already",
            fix="load the base model afresh for each adapter",
        )
    _check_names(base_model, peft)
    settings = peft.model_dump(exclude={"peft_type"})
    try:
        with global_generators_kept(), warnings.catch_warnings():
            # PEFT asks transformers for a property under its old name.
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(base_model, LoraConfig(task_type="CAUSAL_LM", **settings))
    except (ValueError, TypeError) as error:
        raise ModelError(
            "PEFT_TARGET",
            f"the tuning method does not fit the base model: {str(error)[:300]}",
            where="peft.target_modules",
            fix="use `all-linear`, or names out of: " + ", ".join(_linear_names(base_model)),
        ) from None
    return model


def _check_names(base_model: Any, peft: PeftSettings) -> None:
    # PEFT passes over a name that fits nothing as long as another one fits.
    modules = [name for name, _ in base_model.named_modules()]
    targets = peft.target_modules if isinstance(peft.target_modules, list) else []
    for key, names in {"target_modules": targets, "modules_to_save": peft.modules_to_save or []}.items():
        for wanted in names:
            if not any(name == wanted or name.endswith(f".{wanted}") for name in modules):
                raise ModelError(
                    "PEFT_TARGET",
                    f"the base model has no module {wanted!r}",
                    where=f"peft.{key}",
                    fix="names out of: " + ", ".join(_linear_names(base_model)),
                )


def _linear_names(base_model: Any) -> list[str]:
    names = {name.rsplit(".", 1)[-1] for name, module in base_model.named_modules() if hasattr(module, "weight")}
    return sorted(names)[:20]


def skeleton(folder: Path, peft: PeftSettings) -> TunableModel:
    """Return the model with its adapter on the meta device: shapes and names, no weights.

    Args:
        folder: The base model's folder; only its config is read.
        peft: The tuning method.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"), global_generators_kept():
        base_model = AutoModelForCausalLM.from_config(config)
        base_model.requires_grad_(False)
        return TunableModel(base_model, peft)


def save_adapter(
    tensors: Mapping[str, torch.Tensor], *, folder: Path, base: Path, peft: PeftSettings, name: str
) -> None:
    """Write an adapter in PEFT's layout, which `PeftModel.from_pretrained` loads.

    Args:
        tensors: The adapter, by parameter name.
        folder: Where `adapter_model.safetensors` and `adapter_config.json` go.
        base: The base model's folder; only its config is read.
        peft: The tuning method.
        name: What the adapter's config calls the base model.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tunable = skeleton(base, peft)
    full = dict.fromkeys(tunable.model.state_dict(), None) | dict(tensors)
    kept = {key: value for key, value in full.items() if value is not None}
    state = get_peft_model_state_dict(tunable.model, state_dict=kept, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.contiguous() for key, value in state.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    config = tunable.model.peft_config["default"]
    config.base_model_name_or_path = name
    config.inference_mode = True
    config.save_pretrained(str(folder))
    _sort_config(folder / "adapter_config.json")


def _sort_config(path: Path) -> None:
    # PEFT keeps target_modules in a set, whose order changes from process to process.
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = sorted(value, key=str)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
