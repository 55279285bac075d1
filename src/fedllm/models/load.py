"""Load a base model and its tokenizer from a folder or a hub id, without running code of theirs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fedllm.errors import ModelError, ResourceError
from fedllm.models.digest import base_digest, tokenizer_digest
from fedllm.models.settings import ModelSettings

# What transformers raises on folders that it cannot make sense of.
_LOADING = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError, SafetensorError)


@dataclass(frozen=True)
class Base:
    """A frozen base model with its tokenizer and the digests of both."""

    model: Any
    tokenizer: Any
    digest: str
    tokenizer_digest: str


def find_base(settings: ModelSettings, *, base_dir: Path, override: str | None = None) -> Path:
    """Return the folder that holds the base model, fetched from the hub if it is a hub id.

    Args:
        settings: The job's `model` section.
        base_dir: Where relative paths start (the job file's folder).
        override: A party's own path to its copy.

    Raises:
        ModelError: `MODEL_NOT_FOUND` or `MODEL_UNSAFE`.
    """
    name = override or settings.model_name_or_path
    folder = (base_dir / Path(name).expanduser()).resolve()
    if not folder.is_dir():
        if Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise ModelError(
                "MODEL_NOT_FOUND",
                f"no folder {folder}",
                where="model.model_name_or_path",
                fix="name a folder with config.json and *.safetensors, or a hub id such as org/name",
            )
        folder = _from_hub(name, settings.model_revision)
    return _checked(folder)


def _from_hub(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            "MODEL_NOT_FOUND",
            f"{name!r} is no folder here, and the hub did not give it ({type(error).__name__})",
            where="model.model_name_or_path",
            fix="check the spelling and the network, or copy the model here and name its folder",
        ) from None


def _checked(folder: Path) -> Path:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ModelError(
            "MODEL_NOT_FOUND",
            f"{folder} has no config.json",
            where="model.model_name_or_path",
            fix="name the folder that `save_pretrained` wrote",
        )
    for path in sorted(folder.glob("*config.json")):
        if key := _key_to_code(_read_config(path)):
            raise _unsafe(
                f"{path} asks to run code of its own (`{key}`)", "use a model whose code is part of transformers"
            )
    if (folder / "adapter_config.json").exists():
        # transformers would load the base model that the adapter names, from wherever that is.
        raise _unsafe(f"{folder} holds an adapter, not a base model", "name the base model, or merge the adapter first")
    if not any(folder.glob("*.safetensors")):
        raise _unsafe(
            f"{folder} has no *.safetensors weights; other formats can run code when they are loaded",
            "convert the weights: load them in a sandbox and `save_pretrained(..., safe_serialization=True)`",
        )
    _check_index(folder)
    return folder


def _unsafe(what: str, fix: str) -> ModelError:
    return ModelError("MODEL_UNSAFE", what, where="model.model_name_or_path", fix=fix)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ModelError("MODEL_NOT_FOUND", f"{path} is not a JSON object", fix="copy the model again")
    return config


def _key_to_code(value: Any) -> str | None:
    """Return the first key that makes transformers fetch or run code, at any depth; None if there is none."""
    if isinstance(value, list):
        return next((key for item in value if (key := _key_to_code(item))), None)
    if not isinstance(value, dict):
        return None
    for name, item in value.items():
        # An attention named `org/name` is a kernel on the hub.
        if name == "auto_map" or ("attn_implementation" in name and "/" in str(item)):
            return str(name)
    return _key_to_code(list(value.values()))


def _check_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return
    shards = _read_config(path).get("weight_map")
    names = set(map(str, shards.values())) if isinstance(shards, dict) else {""}
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise _unsafe(
                f"{path} points to {name[:80]!r}, which is no *.safetensors file of this folder", "copy the model again"
            )


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a model folder, with a padding token.

    Args:
        folder: A folder from `find_base`.

    Raises:
        ModelError: `MODEL_NOT_FOUND` when there is none, or it has no stop token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "MODEL_NOT_FOUND",
            f"{folder} has no tokenizer that transformers can load ({type(error).__name__})",
            where="model.model_name_or_path",
            fix="copy tokenizer.json and tokenizer_config.json beside the weights",
        ) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "MODEL_NOT_FOUND",
            f"the tokenizer in {folder} has no stop token (eos_token)",
            where="model.model_name_or_path",
            fix="set eos_token in tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_machine(settings: ModelSettings, device: str) -> None:
    """Raise when the machine lacks the device, or the attention code, that is asked for.

    Args:
        settings: The job's `model` section.
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        ResourceError: `DEVICE_MISSING`.
    """
    number = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and not (torch.cuda.is_available() and number < torch.cuda.device_count()):
        raise ResourceError(
            "DEVICE_MISSING",
            f"device {device!r} is not there",
            where="party files, device",
            fix="set `device: cpu` in party.yaml",
        )
    from transformers.utils import is_flash_attn_2_available

    if settings.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise ResourceError(
            "DEVICE_MISSING",
            "flash_attention_2 needs the package flash-attn and a GPU, which are not here",
            where="model.attn_implementation",
            fix="set `attn_implementation: sdpa`",
        )


def load_base(settings: ModelSettings, *, folder: Path, device: str = "cpu") -> Base:
    """Return the frozen base model of a folder, in evaluation mode.

    Args:
        settings: The job's `model` section.
        folder: A folder from `find_base`.
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        ModelError: The weights cannot be loaded, or are not those the job names.
        ResourceError: The device is not there.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    check_machine(settings, device)
    digest = base_digest(folder)
    if settings.base_digest not in (None, digest):
        raise ModelError(
            "MODEL_MISMATCH",
            f"the base model in {folder} has digest {digest[:16]}..., the job names another",
            where="model.base_digest",
            fix="copy the base model that the job names",
        )
    tokenizer = load_tokenizer(folder)
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=getattr(torch, settings.dtype),
            attn_implementation=settings.attn_implementation,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
    except _LOADING as error:
        raise ModelError(
            "MODEL_NOT_FOUND",
            f"transformers cannot load {folder} as a causal language model ({type(error).__name__}: {error})",
            where="model.model_name_or_path",
            fix="check the folder with AutoModelForCausalLM.from_pretrained",
        ) from None
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    if missing := sorted(loaded["missing_keys"]):
        # transformers would fill them at random, differently at each party.
        raise ModelError(
            "MODEL_NOT_FOUND",
            f"{folder} lacks the weights {', '.join(missing[:5])}",
            where="model.model_name_or_path",
            fix="copy the model again, whole",
        )
    model.requires_grad_(False).eval().to(device)
    return Base(model, tokenizer, digest, tokenizer_digest(tokenizer))
