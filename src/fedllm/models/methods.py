"""Attach a tuning method to a base model: PEFT's methods through PEFT, three of our own beside them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedllm.errors import ModelError
from fedllm.models.blocks import cuts_of, in_tuned, inside, tuned_prefixes
from fedllm.models.bottleneck import add_bottlenecks, bottlenecks
from fedllm.models.settings import OWN_TYPES, PROMPT_TYPES, PeftSettings
from fedllm.seeds import PROCESS_STATE, global_generators_kept
from fedllm.tasks import CAUSAL_LM, CLASSIFICATION, TaskName

_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM", "sequence_classification": "SEQ_CLS"}


def attach(base_model: Any, peft: PeftSettings, task: TaskName = CAUSAL_LM) -> Any:
    """Return the model with what is tuned set to require gradients, and nothing else.

    Args:
        base_model: A frozen model of transformers.
        peft: The tuning method.
        task: What the model is tuned to do. Of a classifier the head is trained too, whatever the method.

    Raises:
        ModelError: `PEFT_TARGET`, the method does not fit the model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    used = (isinstance(module, BaseTunerLayer) for module in base_model.modules())
    if any(used) or bottlenecks(base_model) or any(p.requires_grad for p in base_model.parameters()):
        raise ModelError(
            "PEFT_TARGET",
            "the base model carries an adapter already",
            fix="load the base model afresh for each adapter",
        )
    if reason := refusal(peft, base_model, task):
        raise ModelError("PEFT_TARGET", reason, where="peft.peft_type", fix="choose another `peft_type`, such as LORA")
    _check_names(base_model, peft)
    _check_saved(base_model, peft)
    model = _OWN[peft.peft_type](base_model, peft) if peft.peft_type in OWN_TYPES else _by_peft(base_model, peft, task)
    if peft.peft_type in (*OWN_TYPES, *PROMPT_TYPES):
        _train_head(base_model, task)
    _check_precision(model)
    return model


def _train_head(base_model: Any, task: TaskName) -> None:
    """Set a classifier's head to be trained, where PEFT has not wrapped it for that."""
    from peft.utils import ModulesToSaveWrapper

    for name in head_modules(base_model) if task == CLASSIFICATION else ():
        module = base_model.get_submodule(name)
        if not isinstance(module, ModulesToSaveWrapper):
            module.requires_grad_(True)


def refusal(peft: PeftSettings, base_model: Any, task: TaskName) -> str | None:
    """Return why a method cannot be used with a family of models; None if it can.

    These are the pairs that fail only in a forward pass, or that are silently wrong; what does not fit by its modules'
    names is found when it is attached.

    Args:
        peft: The tuning method.
        base_model: The base model, or its skeleton.
        task: What the model is tuned to do.
    """
    family, method = base_model.config.model_type, peft.peft_type
    if cuts_of(base_model.config):
        if method in PROMPT_TYPES:
            return f"{method} works on the whole model, and of an emulator's package only the outer layers may be tuned"
        if peft.modules_to_save:
            return (
                "`modules_to_save` are whole modules, and of an emulator's package only the outer layers may be tuned"
            )
    if method in ("PROMPT_TUNING", "P_TUNING"):
        if task == CLASSIFICATION and "score" in head_modules(base_model):
            return f"{family} finds the last word of a text by its tokens, which virtual tokens before them hide"
        if family == "albert":
            return "albert's embeddings are narrower than its layers, which PEFT's virtual tokens do not allow for"
    if method in PROMPT_TYPES and task == CLASSIFICATION and base_model.config.is_encoder_decoder:
        return f"{family} takes no virtual tokens when it classifies"
    if method == "PREFIX_TUNING" and family in _NO_CACHE:
        return f"prefix tuning feeds the attention's cache, and {family} has none"
    return None


# Family -> (target_modules, feedforward_modules) of IA3 where PEFT has none: keys, values, the end of the feed-forward.
_IA3: dict[str, tuple[list[str], list[str]]] = {
    "glm": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "glm4": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "phi3": (["qkv_proj", "down_proj"], ["down_proj"]),
    "mixtral": (["k_proj", "v_proj"], []),
    "albert": (["key", "value", "ffn_output"], ["ffn_output"]),
    "distilbert": (["k_lin", "v_lin", "lin2"], ["lin2"]),
}
_NEEDLESS = (
    # Norms of families have classes of their own.
    "Unsupported layer type .*Norm",
    # VeRA's random matrices follow from a key; the same versions of the libraries make the same ones.
    "Specified to not (save|load) vera_A and vera_B",
    # generate() counts places; behind virtual tokens PEFT leaves that to the model.
    "Position ids are not supported for parameter efficient tuning",
    # Of experts that a tiny or an older model does not have.
    "The following (rank|alpha)_pattern keys did not match",
)
_NO_CACHE = ("albert", "deberta-v2", "distilbert")


def _by_peft(base_model: Any, peft: PeftSettings, task: TaskName) -> Any:
    from peft import get_peft_model

    try:
        with global_generators_kept(), quiet_peft():
            return get_peft_model(base_model, _config(base_model, peft, task))
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise ModelError(
            "PEFT_TARGET",
            f"the tuning method does not fit the base model: {str(error)[:300]}",
            where="peft.target_modules",
            fix="use `all-linear`, or names out of: " + ", ".join(_module_names(base_model)),
        ) from None


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep back what PEFT warns of without need, for as long as the context lasts."""
    with PROCESS_STATE, warnings.catch_warnings():
        # It asks transformers for a property under its old name.
        warnings.simplefilter("ignore", FutureWarning)
        for message in _NEEDLESS:
            warnings.filterwarnings("ignore", message)
        yield


def _config(base_model: Any, peft: PeftSettings, task: TaskName) -> Any:
    import peft as library
    from transformers.pytorch_utils import Conv1D

    classes = {
        "LORA": library.LoraConfig,
        "ADALORA": library.AdaLoraConfig,
        "VERA": library.VeraConfig,
        "IA3": library.IA3Config,
        "PREFIX_TUNING": library.PrefixTuningConfig,
        "PROMPT_TUNING": library.PromptTuningConfig,
        "P_TUNING": library.PromptEncoderConfig,
        "LN_TUNING": library.LNTuningConfig,
    }
    settings = peft.own()
    if peft.peft_type == "ADALORA":
        # Ranks shrink by rounds, see fedllm.models.adalora; PEFT's own allocator, which counts steps, is never called.
        settings |= {"tinit": 0, "tfinal": 0, "total_step": 1}
    if peft.peft_type == "VERA":
        # The random matrices that all sites share follow from PEFT's key; as many bytes as a layer are not saved again.
        settings["save_projection"] = False
    if peft.peft_type in ("LORA", "ADALORA", "VERA", "IA3"):
        settings["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in base_model.modules())
    if peft.peft_type in PROMPT_TYPES:
        # PEFT looks for the names that most configs have; transformers knows each config's own.
        config = base_model.config
        settings |= {"num_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads}
        settings["token_dim"] = config.hidden_size
    if peft.peft_type == "LN_TUNING" and peft.target_modules is None:
        settings["target_modules"] = _norms(base_model)
    if peft.peft_type == "IA3" and peft.target_modules is None and base_model.config.model_type in _IA3:
        settings["target_modules"], settings["feedforward_modules"] = _IA3[base_model.config.model_type]
    if task == CLASSIFICATION and "modules_to_save" in settings:
        head = head_modules(base_model)
        settings["modules_to_save"] = sorted({*head, *(peft.modules_to_save or [])})
    if peft.target_modules == "all-linear" and (task == CLASSIFICATION or _has_fused_experts(base_model)):
        settings["target_modules"] = _linear(base_model, head_modules(base_model) if task == CLASSIFICATION else [])
    if prefixes := tuned_prefixes(base_model):
        settings |= _within(base_model, peft, settings, prefixes)
    given = {key: value for key, value in settings.items() if value is not None}
    return classes[peft.peft_type](task_type=_TASK_TYPES[task], **given)


def _within(base_model: Any, peft: PeftSettings, settings: dict[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings that name modules, with full names of those in the layers that may be tuned.

    PEFT's own `layers_to_transform` does not go with `all-linear`, and knows one stack of blocks only.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    wanted, forward = settings["target_modules"], settings.get("feedforward_modules")
    if peft.peft_type == "IA3" and wanted is None:
        family = base_model.config.model_type
        wanted, forward = TARGETS.get(family), FEEDFORWARD.get(family)
    names = [name for name, _ in base_model.named_modules()]
    if wanted == "all-linear":
        wanted = _linear(base_model, [])
    found = {"target_modules": inside(_fitting(names, wanted or []), prefixes)}
    if not found["target_modules"]:
        raise ValueError("no module of this name is in the layers that may be tuned")
    return found | ({"feedforward_modules": inside(_fitting(names, forward), prefixes)} if forward else {})


def _fitting(names: list[str], wanted: str | list[str]) -> list[str]:
    """Return the modules that PEFT would take for a regular expression, or for ends of names."""
    if isinstance(wanted, str):
        return [name for name in names if re.fullmatch(wanted, name)]
    return [name for name in names if any(name == end or name.endswith(f".{end}") for end in wanted)]


def head_modules(base_model: Any) -> list[str]:
    """Return the modules of a classifier that its base model has not.

    Args:
        base_model: The classifier, or its skeleton.
    """
    return [
        name
        for name, module in base_model.named_children()
        if name != base_model.base_model_prefix and any(True for _ in module.parameters())
    ]


def _norms(base_model: Any) -> list[str]:
    return [name for name, module in base_model.named_modules() if type(module).__name__.endswith("Norm")]


def _has_fused_experts(base_model: Any) -> bool:
    """Return whether PEFT would tune experts that lie in one tensor: all their factors as one product, which it is not.

    That is fine for a mean of factors, and wrong for all that looks at products.
    """
    return any(parameter.dim() == 3 and ".experts." in name for name, parameter in base_model.named_parameters())


def _linear(base_model: Any, head: list[str]) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    output = base_model.get_output_embeddings()
    return [
        name
        for name, module in base_model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output and name.split(".")[0] not in head
    ]


def _bottleneck(base_model: Any, peft: PeftSettings) -> Any:
    with global_generators_kept():
        num_blocks = add_bottlenecks(base_model, size=peft.bottleneck_size or 1, placement=peft.placement or "pfeiffer")
    if not num_blocks:
        raise _nothing("no list of transformer blocks was found in the base model")
    return base_model


def _bitfit(base_model: Any, peft: PeftSettings) -> Any:
    """Train the biases alone. Source: Ben Zaken et al. 2022, arXiv:2106.10199, section 3."""
    tuned = _tuned_parameters(base_model)
    biases = [parameter for name, parameter in tuned if name.endswith("bias")]
    if not biases:
        raise _nothing(f"{type(base_model).__name__} has no biases to train")
    for parameter in biases:
        parameter.requires_grad_(True)
    return base_model


def _full(base_model: Any, peft: PeftSettings) -> Any:
    if any(not parameter.is_floating_point() for parameter in base_model.parameters()):
        raise _nothing("quantised weights cannot be trained")
    for _, parameter in _tuned_parameters(base_model):
        parameter.requires_grad_(True)
    return base_model


def _tuned_parameters(base_model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    prefixes = tuned_prefixes(base_model)
    return [(name, parameter) for name, parameter in base_model.named_parameters() if in_tuned(name, prefixes)]


_OWN: dict[str, Callable[[Any, PeftSettings], Any]] = {"BOTTLENECK": _bottleneck, "BITFIT": _bitfit, "FULL": _full}


def _nothing(what: str) -> ModelError:
    return ModelError("PEFT_TARGET", what, where="peft.peft_type", fix="choose another `peft_type`, such as LORA")


def _check_precision(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ModelError(
                "PEFT_TARGET",
                f"{name} would be trained in {str(parameter.dtype).removeprefix('torch.')}, where small updates vanish",
                where="model.dtype",
                fix="set `model.dtype: float32`",
            )


def _check_names(base_model: Any, peft: PeftSettings) -> None:
    # PEFT passes over a name that fits nothing as long as another one fits.
    modules = [name for name, _ in base_model.named_modules()]
    for key in ("target_modules", "feedforward_modules", "modules_to_save"):
        names = getattr(peft, key)
        for wanted in names if isinstance(names, list) else ():
            if not any(name == wanted or name.endswith(f".{wanted}") for name in modules):
                raise ModelError(
                    "PEFT_TARGET",
                    f"the base model has no module {wanted!r}",
                    where=f"peft.{key}",
                    fix="names out of: " + ", ".join(_module_names(base_model)),
                )


def _check_saved(base_model: Any, peft: PeftSettings) -> None:
    for wanted in peft.modules_to_save or ():
        if reason := _unfit_to_save(base_model, wanted):
            fix = f"leave {wanted!r} out"
            raise ModelError("PEFT_TARGET", reason, where="peft.modules_to_save", fix=fix)


def _unfit_to_save(base_model: Any, wanted: str) -> str | None:
    tied = base_model.all_tied_weights_keys
    if any(f".{wanted}." in f".{name}." for name in (*tied, *tied.values())):
        return (
            f"a module to save has weights that {base_model.config.model_type} uses in several places: PEFT trains a"
            " copy for one of them, and merged into the base it would be another model"
        )
    for name, module in base_model.named_modules():
        # On the meta device nothing is quantised, so validation does not see this.
        if f".{name}".endswith(f".{wanted}") and not all(part.is_floating_point() for part in module.parameters()):
            return f"the weights of {name} are held in 8 or 4 bits, and those of a module to save are trained"
    return None


def _module_names(base_model: Any) -> list[str]:
    names = {name.rsplit(".", 1)[-1] for name, module in base_model.named_modules() if hasattr(module, "weight")}
    return sorted(names)[:20]
