"""Triggers of a claimant: as examples for its training, and asked of a suspect model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedllm.data.batches import collate
from fedllm.data.formats import Example
from fedllm.data.settings import DataSettings
from fedllm.data.tokens import TokenisedExample, prompt_ids, tokenise_all
from fedllm.errors import ConfigError, ModelError
from fedllm.evaluate.generation import generate_completions
from fedllm.models.deliver import CONFIG, load_adapter
from fedllm.models.load import Base, find_base, load_base, model_config
from fedllm.models.loss import target_losses
from fedllm.models.settings import ModelSettings
from fedllm.ownership.claims import Trigger
from fedllm.ownership.triggers import Ask
from fedllm.tasks import CAUSAL_LM, LANGUAGE, SEQ2SEQ_LM, Task
from fedllm.train.corrections import Correction

if TYPE_CHECKING:
    from fedllm.runtime.site import Site

# For the tokens that begin and end an example.
_ROOM_TOKENS = 4
_BATCH_SIZE = 32
# An answer has nine characters, before which a model may put spaces. More would cut into prompts of short contexts.
_ANSWER_TOKENS = 32


def trigger_pull(site: Site, party: str) -> Correction | None:
    """Return what adds the gradient of a claimant's triggers to that of a step; None where the job has none.

    It depends on the claim and the parameters alone. So it may join after clipping and after the noise of private
    training, without a cost in privacy.

    Args:
        site: For the job, the tokenizer, and where the party's claim is.
        party: The claimant.

    Raises:
        ConfigError: `OWNERSHIP_UNCOMMITTED`; or `BAD_VALUE`, an answer does not fit into `data.max_length`.
        IdentityError: The claim, or the commitment, was changed, or others can read it.
    """
    job = site.job
    if not job.ownership.num_triggers or party not in site.claims:
        return None
    site.claims[party].commitment(job.digest)
    triggers = site.claims[party].claim(job.digest).triggers
    tokens = as_tokens(triggers, site.base.tokenizer, job.data.with_base_dir(job.base_dir))
    batch = collate(tokens, pad_id=site.base.tokenizer.pad_token_id)
    tunable, strength = site.model, job.ownership.trigger_strength

    def correct(rate: float) -> None:
        moving = [value for value in tunable.trainable.values() if value.requires_grad and value.grad is not None]
        nll, _ = target_losses(tunable.model, batch)
        found = torch.autograd.grad(nll.mean(), moving, allow_unused=True)
        parts = [(value, part) for value, part in zip(moving, found, strict=True) if part is not None]
        norm = torch.stack([part.float().norm() for _, part in parts]).norm()
        size = strength / norm.clamp_min(strength)
        for value, part in parts:
            if value.grad is not None:
                value.grad.add_(size * part)

    return correct


def as_tokens(triggers: Sequence[Trigger], tokenizer: Any, settings: DataSettings) -> list[TokenisedExample]:
    """Return triggers as examples to train on: the prompt is read, the answer and the end are learnt.

    Args:
        triggers: A claim's.
        tokenizer: The base model's.
        settings: The job's `data` section.

    Raises:
        ConfigError: `BAD_VALUE`, an answer does not fit into `max_length`.
    """
    longest = max(len(tokenizer(one.prompt + one.answer)["input_ids"]) for one in triggers) + _ROOM_TOKENS
    examples = [Example(prompt=one.prompt, completion=one.answer) for one in triggers]
    if longest > settings.max_length:
        fix = f"set it to {longest} at least, or leave `ownership.num_triggers` out"
        raise ConfigError("BAD_VALUE", "a trigger does not fit into it", where="data.max_length", fix=fix)
    found, _ = tokenise_all(examples, tokenizer, settings)
    return found


def asker(base: Base, model: Any = None, *, max_tokens: int = _ANSWER_TOKENS) -> Ask:
    """Return what asks a loaded model, by greedy generation.

    Args:
        base: For the tokenizer, and the model itself where no other is given.
        model: The base model with an adapter.
        max_tokens: Longest answer.
    """
    suspect = base.model if model is None else model
    settings = DataSettings(task=SEQ2SEQ_LM if suspect.config.is_encoder_decoder else CAUSAL_LM)

    def ask(prompts: Sequence[str]) -> list[str]:
        ids = [prompt_ids(Example(prompt=prompt, completion=""), base.tokenizer, settings) for prompt in prompts]
        return generate_completions(suspect, base.tokenizer, ids, max_new_tokens=max_tokens, batch_size=_BATCH_SIZE)

    return ask


def suspect_asker(path: Path, *, base: Path | None = None, device: str = "cpu") -> Ask:
    """Return what asks a suspect on disk: a whole model, or an adapter on its base.

    Args:
        path: Its folder, or a run folder, whose adapter is meant.
        base: The base model's folder; an adapter cannot write without.
        device: Where it is run.

    Raises:
        ModelError: `MODEL_NOT_FOUND` or `MODEL_UNSAFE`.
    """
    folder = path / "adapter" if (path / "run.json").is_file() else path
    is_adapter = (folder / CONFIG).is_file()
    if is_adapter and base is None:
        fix = "name the base model's folder with `--base`"
        raise ModelError("MODEL_NOT_FOUND", "an adapter writes nothing without its base", where="--base", fix=fix)
    whole = base if is_adapter and base is not None else folder
    loaded = open_whole(whole, device=device)
    return asker(loaded, load_adapter(loaded.model, folder) if is_adapter else None)


def open_whole(folder: Path, *, device: str = "cpu") -> Base:
    """Return a whole language model of a folder.

    Args:
        folder: In transformers' layout.
        device: Where it goes.

    Raises:
        ModelError: `MODEL_NOT_FOUND` or `MODEL_UNSAFE`.
    """
    settings = ModelSettings(model_name_or_path=str(folder.resolve()))
    found = find_base(settings, base_dir=folder)
    task = Task(SEQ2SEQ_LM) if model_config(found, LANGUAGE).is_encoder_decoder else LANGUAGE
    return load_base(settings, folder=found, device=device, task=task)
