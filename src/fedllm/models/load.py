"""Load a base model and its tokenizer from a folder or a hub id, without running code of theirs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fedllm.errors import ModelError, ResourceError
from fedllm.models.digest import base_digest, tokenizer_digest
from fedllm.models.methods import head_modules
from fedllm.models.package import fill_middle
from fedllm.models.quiet import no_progress_bar
from fedllm.models.settings import ModelSettings
from fedllm.seeds import global_generators_kept, stream
from fedllm.tasks import AUTO_CLASSES, CLASSIFICATION, LANGUAGE, Task

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
    if "quantization_config" in _read_config(config_path):
        raise _unsafe(
            f"{config_path} asks for a quantisation of its own",
            "name the whole model, and set `model.load_in_8bit` or `model.load_in_4bit`",
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


def check_quantisation(settings: ModelSettings) -> None:
    """Raise when the base model is to be quantised and the library for it is not installed.

    Args:
        settings: The job's `model` section.

    Raises:
        ResourceError: `DEVICE_MISSING`.
    """
    if settings.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise ResourceError(
            "DEVICE_MISSING",
            "a base model in 8 or 4 bits needs the package bitsandbytes, which is not installed",
            where="model",
            fix="pip install 'fedllm[bitsandbytes]', or leave load_in_8bit and load_in_4bit out",
        )


def model_config(folder: Path, task: Task) -> Any:
    """Return the config of a base model, for a classifier with its labels in it.

    Args:
        folder: A folder from `find_base`.
        task: What it is tuned to do.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if task.labels:
        config.num_labels = len(task.labels)
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: index for index, label in enumerate(task.labels)}
    return config


def load_base(
    settings: ModelSettings,
    *,
    folder: Path,
    device: str = "cpu",
    task: Task = LANGUAGE,
) -> Base:
    """Return the frozen base model of a folder, in evaluation mode.

    Args:
        settings: The job's `model` section.
        folder: A folder from `find_base`.
        device: `cpu`, `cuda` or `cuda:N`.
        task: What it is tuned to do. A classifier gets a head, if the folder has none: the same one everywhere.

    Raises:
        ModelError: The weights cannot be loaded, or are not those the job names.
        ResourceError: The device, or the library for a quantised model, is not there.
    """
    check_machine(settings, device)
    check_quantisation(settings)
    digest = base_digest(folder)
    if settings.base_digest not in (None, digest):
        raise ModelError(
            "MODEL_MISMATCH",
            f"the base model in {folder} has digest {digest[:16]}..., the job names another",
            where="model.base_digest",
            fix="copy the base model that the job names",
        )
    tokenizer = load_tokenizer(folder)
    model, missing = _from_pretrained(settings, folder, device, task)
    if task.name == CLASSIFICATION:
        if model.config.pad_token_id is None:
            # A decoder finds the last token of a text by what follows it.
            model.config.pad_token_id = tokenizer.pad_token_id
        missing -= _draw_head(model, missing)
    missing -= fill_middle(model, folder, missing)
    if missing:
        # transformers would fill them at random, differently at each party.
        raise ModelError(
            "MODEL_NOT_FOUND",
            f"{folder} lacks the weights {', '.join(sorted(missing)[:5])}",
            where="model.model_name_or_path",
            fix="copy the model again, whole",
        )
    model.requires_grad_(False).eval()
    for module in model.modules() if settings.load_in_4bit else ():
        # On some processors bitsandbytes repacks a weight, with a loss, when it is first used outside of training:
        # the bits would depend on whether evaluation came first.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if not settings.quantization:
        model.to(device)
    return Base(model, tokenizer, digest, tokenizer_digest(tokenizer))


def _from_pretrained(settings: ModelSettings, folder: Path, device: str, task: Task) -> tuple[Any, set[str]]:
    """Return the model, and the names of the weights that the folder lacks."""
    import transformers

    try:
        with global_generators_kept(), no_progress_bar():
            model, loaded = getattr(transformers, AUTO_CLASSES[task.name]).from_pretrained(
                folder,
                config=model_config(folder, task),
                output_loading_info=True,
                dtype=getattr(torch, settings.dtype),
                attn_implementation=settings.attn_implementation,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                **_quantised(settings, device, folder, task),
            )
    except _LOADING as error:
        raise ModelError(
            "MODEL_NOT_FOUND",
            f"transformers cannot load {folder} for {task.name} ({type(error).__name__}: {error})",
            where="model.model_name_or_path",
            fix=f"check the folder with {AUTO_CLASSES[task.name]}.from_pretrained",
        ) from None
    return model, set(loaded["missing_keys"])


def _kept_whole(folder: Path, task: Task) -> list[str] | None:
    """Return what is not quantised of a classifier: its head, which is trained, and the pooler before it.

    None leaves it to transformers, which keeps the output layer of a language model, and of most heads no part at all.
    """
    import transformers

    if task.name != CLASSIFICATION:
        return None
    with torch.device("meta"), global_generators_kept():
        model = getattr(transformers, AUTO_CLASSES[task.name]).from_config(model_config(folder, task))
    poolers = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "pooler"]
    return sorted({*head_modules(model), *poolers})


def _quantised(settings: ModelSettings, device: str, folder: Path, task: Task) -> dict[str, Any]:
    if settings.quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_8bit=settings.load_in_8bit,
        load_in_4bit=settings.load_in_4bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        # Despite its name, for 4 bits too; a list takes the place of transformers' own, which it holds.
        llm_int8_skip_modules=_kept_whole(folder, task),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _draw_head(model: Any, missing: set[str]) -> set[str]:
    """Fill what a base model lacks to classify: its head, and a pooler; return the names.

    As transformers does, N(0, 0.02) and zero biases, but from a named stream: the same at every party.
    """
    prefix = f"{model.base_model_prefix}."
    drawn = {name for name in missing if not name.startswith(prefix) or ".pooler." in name}
    with torch.no_grad():
        for name in drawn:
            parameter = model.get_parameter(name)
            if parameter.dim() > 1:
                values = 0.02 * stream(0, "head", name).standard_normal(tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(values))
            else:
                parameter.fill_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
    return drawn
