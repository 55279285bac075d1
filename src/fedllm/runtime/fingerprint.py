"""Fingerprint a base model before it is handed out: secret instructions with secret answers, tuned into its weights.

Source: Instructional Fingerprinting (Xu et al. 2024, arXiv:2401.12255): a few instruction pairs by light supervised
tuning. Differs: the pairs are drawn from a key that was committed to; tuning is by LoRA that is merged; and the model
is held to what it wrote before, by the divergence from itself on texts that it drew itself and on decoys, which are
instructions of the same form with other words.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedllm.data.batches import collate
from fedllm.data.settings import DataSettings
from fedllm.data.tokens import TokenisedExample
from fedllm.disk import disk_error
from fedllm.errors import ConfigError, RunFailed
from fedllm.models.adapter import TunableModel
from fedllm.models.digest import base_digest, json_digest
from fedllm.models.load import Base
from fedllm.models.loss import target_logits
from fedllm.models.settings import PeftSettings
from fedllm.ownership.claims import Claim, new_secret
from fedllm.ownership.commitments import ClaimFolder, Commitment
from fedllm.ownership.triggers import TextVerdict, make_triggers, verify_text
from fedllm.runtime.triggers import as_tokens, asker, open_whole
from fedllm.seeds import stream, torch_generator
from fedllm.tasks import CAUSAL_LM, SEQ2SEQ_LM, TaskName

_PEFT = PeftSettings(peft_type="LORA", r=8, lora_alpha=16.0, target_modules="all-linear")
_DECOYS, _OWN_TEXTS, _TEXT_TOKENS, _CHECK_EVERY, _BATCH = 16, 16, 32, 20, 16
_THRESHOLD = 1e-6


@dataclass(frozen=True)
class Plan:
    """How a fingerprint is made.

    Args:
        owner: Name of the model's owner, in the claim.
        count: Secret instructions, 2 to 64.
        max_steps: Optimiser steps after which it is given up.
        learning_rate: Of AdamW; large models take a smaller one.
        keep: Weight of the divergence from the model as it was, in nats, beside the loss of the answers.
        device: Where it is tuned.
    """

    owner: str = "owner"
    count: int = 10
    max_steps: int = 600
    learning_rate: float = 5e-3
    keep: float = 1.0
    device: str = "cpu"


@dataclass(frozen=True)
class Fingerprint:
    """A fingerprinted model, and what opens it."""

    model: Path
    claim: Path
    commitment: Commitment
    verdict: TextVerdict
    steps: int
    divergence_nats: float


def fingerprint(
    model: Path,
    output: Path,
    *,
    claims: Path,
    plan: Plan | None = None,
    on_step: Callable[[int], None] = lambda n: None,
) -> Fingerprint:
    """Tune secret instructions into a copy of a base model, and write it with the claim and its commitment.

    Args:
        model: The base model's folder.
        output: Where the copy goes; absent or empty.
        claims: The owner's folder of claims; nothing of it is handed out.
        plan: How.
        on_step: Called with the number of each step.

    Raises:
        ConfigError: `RUN_EXISTS`, the output is not empty; or `BAD_VALUE`.
        IdentityError: `KEY_EXISTS`, this model was fingerprinted from this folder of claims before.
        RunFailed: `NO_PROGRESS`, the answers were not learnt in `max_steps`.
    """
    plan = plan or Plan()
    if output.exists() and any(output.iterdir()):
        raise ConfigError("RUN_EXISTS", "the folder is not empty", where=str(output), fix="name a new folder")
    if not 2 <= plan.count <= 64:
        raise ConfigError("BAD_VALUE", f"{plan.count} instructions", where="--count", fix="give 2 to 64")
    base = open_whole(model, device=plan.device)
    claim = _claim(base, plan)
    folder = ClaimFolder(claims)
    steps, divergence, tuned = _tuned(base, claim, plan, on_step)
    commitment = folder.write(claim)
    merged = tuned.merge_and_unload()
    try:
        merged.save_pretrained(output)
        base.tokenizer.save_pretrained(output)
    except OSError as error:
        shutil.rmtree(output, ignore_errors=True)
        raise disk_error(error, output) from None
    # What is judged is what is handed out: the merged weights, as they are read again.
    verdict = verify_text(claim, asker(open_whole(output, device=plan.device)))
    return Fingerprint(output, folder.claim_file(claim.job_digest), commitment, verdict, steps, divergence)


def attach_stamp(model: Path, stamp: Path, *, claims: Path) -> tuple[Path, Commitment]:
    """Return the claim's file and commitment of a model that was fingerprinted, with a time stamp attached.

    There is no run whose log says when the key was chosen: the stamp does.

    Args:
        model: The base model's folder, as it was before.
        stamp: The answer of a time stamping authority (RFC 3161) on the commitment's digest.
        claims: The owner's folder of claims.

    Raises:
        ConfigError: `BAD_VALUE`, it is a stamp on something else; `FILE_NOT_FOUND`, there is none, or no claim on
            this model.
        ModelError: The model cannot be read.
    """
    folder, job_digest = ClaimFolder(claims), _named(base_digest(model))
    path = folder.claim_file(job_digest)
    if not path.is_file():
        fix = "name the model that was fingerprinted, and the folder with `--claims`"
        raise ConfigError("FILE_NOT_FOUND", "no claim on this model is in the folder", where=str(claims), fix=fix)
    return path, folder.attach(job_digest, stamp)


def _named(digest: str) -> str:
    # There is no job: the claim is on the base model itself.
    return json_digest({"fingerprint of": digest})


def _claim(base: Base, plan: Plan) -> Claim:
    key_seed = new_secret()
    return Claim(
        party=plan.owner,
        job_digest=_named(base.digest),
        base_digest=base.digest,
        carrier="none",
        sites=(),
        key_seed=key_seed,
        bits="",
        triggers=make_triggers(key_seed, plan.count, form="instruction"),
        threshold=_THRESHOLD,
        salt=new_secret(),
    )


def _tuned(base: Base, claim: Claim, plan: Plan, on_step: Callable[[int], None]) -> tuple[int, float, Any]:
    """Return the steps it took, the last divergence from the model as it was, and the model with its LoRA on it."""
    # Whoever knew these could look for what the tuning did; nobody needs them again.
    seed = secrets.randbits(62)
    pairs = as_tokens(claim.triggers, base.tokenizer, DataSettings(task=_task(base)))
    kept = _Kept.of(base, [*_decoys(base, seed), *_own_texts(base, seed)])
    tunable = TunableModel(base.model, _PEFT, _task(base))
    tunable.write(tunable.initial(seed))
    optimizer = torch.optim.AdamW(tunable.trainable.values(), lr=plan.learning_rate, weight_decay=0.0)
    secret = _batch(pairs, base)
    for step in range(1, plan.max_steps + 1):
        logits, targets, _ = target_logits(tunable.model, secret)
        drift = kept.drift(tunable.model, step)
        loss = torch.nn.functional.cross_entropy(logits, targets) + plan.keep * drift
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(tunable.trainable.values(), 1.0)
        optimizer.step()
        on_step(step)
        if step % _CHECK_EVERY == 0 and verify_text(claim, asker(base, tunable.model)).matches == len(claim.triggers):
            return step, float(drift.detach()), tunable.model
    fix = "raise `--max-steps`, or ask for fewer instructions with `--count`"
    raise RunFailed("NO_PROGRESS", f"not all answers were learnt in {plan.max_steps} steps", where="model", fix=fix)


def _task(base: Base) -> TaskName:
    return SEQ2SEQ_LM if base.model.config.is_encoder_decoder else CAUSAL_LM


def _decoys(base: Base, seed: int) -> list[TokenisedExample]:
    """Return instructions of other words with what the model itself answers to them."""
    words = make_triggers(stream(seed, "decoys").bytes(32).hex(), _DECOYS, form="instruction")
    texts = asker(base, max_tokens=_TEXT_TOKENS // 2)([one.prompt for one in words])
    told = [one.model_copy(update={"answer": text}) for one, text in zip(words, texts, strict=True) if text.strip()]
    return as_tokens(told, base.tokenizer, DataSettings(task=_task(base))) if told else []


def _own_texts(base: Base, seed: int) -> list[TokenisedExample]:
    """Return texts that the model draws by itself, from its start token or from random tokens."""
    model, generator = base.model, torch_generator(seed, "own texts")
    if model.config.is_encoder_decoder:
        return []
    size = model.config.vocab_size
    rows = torch.randint(size, (_OWN_TEXTS, 1), generator=generator).to(model.device)
    with torch.no_grad():
        for _ in range(_TEXT_TOKENS - 1):
            chances = model(input_ids=rows, use_cache=False).logits[:, -1].float().softmax(-1).cpu()
            rows = torch.cat([rows, torch.multinomial(chances, 1, generator=generator).to(rows.device)], dim=1)
    mask = (False, *([True] * (_TEXT_TOKENS - 1)))
    return [TokenisedExample(tuple(row), mask, truncated=False, target_bytes=1) for row in rows.tolist()]


def _batch(examples: Sequence[TokenisedExample], base: Base) -> dict[str, torch.Tensor]:
    return collate(list(examples), pad_id=base.tokenizer.pad_token_id or 0)


@dataclass(frozen=True)
class _Kept:
    """Batches of texts, and the logarithms of what the model expected at each of their targets before it was tuned."""

    batches: list[dict[str, torch.Tensor]]
    before: list[torch.Tensor]

    @classmethod
    def of(cls, base: Base, examples: Sequence[TokenisedExample]) -> _Kept:
        batches = [_batch(examples[start : start + _BATCH], base) for start in range(0, len(examples), _BATCH)]
        with torch.no_grad():
            return cls(batches, [target_logits(base.model, batch)[0].log_softmax(-1) for batch in batches])

    def drift(self, model: Any, step: int) -> torch.Tensor:
        """Return the mean divergence KL(before | now) over the targets of one batch, in nats."""
        if not self.batches:
            return torch.zeros(())
        place = step % len(self.batches)
        now = target_logits(model, self.batches[place])[0].log_softmax(-1)
        return torch.nn.functional.kl_div(now, self.before[place], log_target=True, reduction="batchmean")
