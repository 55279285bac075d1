"""A text rebuilt from one step's update: of all texts, the one whose own update points the same way.

Shapes: N texts tried at once, L words of the text.

Source: Zhu et al. 2019, DLG, arXiv:1906.08935, algorithm 1; the cosine of Geiping et al. 2020, arXiv:2003.14053,
equation 4. Differs: not embeddings are moved along a gradient, but words are tried, which the span test has narrowed
down; so a mismatch of zero is the text itself. It works too where the span test alone does not: where the rank is
small, in the order of the words, and under AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

# (texts, int64, shape (N, L)) -> mismatch of each, shape (N,)
Mismatch = Callable[[torch.Tensor], torch.Tensor]
_AT_ONCE = 128
# Below this a text is taken for the one that was looked for.
_FOUND = 1e-3
# A smaller gain is rounding.
_STEP = 1e-6


@dataclass(frozen=True)
class Rebuilt:
    """The best text found, and its mismatch: 1 less the cosine of its update and the one seen, 0 = it is the text."""

    text: tuple[int, ...]
    mismatch: float


def update_mismatch(
    model: nn.Module,
    start: Mapping[str, torch.Tensor],
    update: Mapping[str, torch.Tensor],
    *,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    given: int = 1,
) -> Mismatch:
    """Return how badly the update of a text fits the one seen: 1 - cosine, in [0, 2], for many texts at a time.

    Args:
        model: The base model with an adapter of the right kind; what it holds is not looked at.
        start: What training started from, by parameter name.
        update: What one step on one text made of it, less the start.
        optimizer: Who made the step. AdamW's first step is the sign of the gradient.
        given: Words at the beginning of the text that are no targets, at least 1.
    """
    seen = {name: value.detach() for name, value in update.items()}
    size = _norm(seen)
    fixed = {name: value.detach() for name, value in model.named_parameters() if name not in start}
    begun = {name: value.detach() for name, value in start.items()}

    def loss(trained: dict[str, torch.Tensor], text: torch.Tensor) -> torch.Tensor:
        inputs: dict[str, Any] = {"input_ids": text[None], "use_cache": False}
        logits = functional_call(model, {**fixed, **trained}, (), inputs).logits[0].float()
        return nn.functional.cross_entropy(logits[given - 1 : -1], text[given:])

    def mismatch(text: torch.Tensor) -> torch.Tensor:
        gradient = grad(loss)(begun, text)
        step = {name: -(value.sign() if optimizer == "adamw" else value) for name, value in gradient.items()}
        product = torch.stack([(step[name] * seen[name]).sum() for name in seen]).sum()
        return 1 - product / (_norm(step) * size + 1e-30)

    every = vmap(mismatch)

    def of_texts(texts: torch.Tensor) -> torch.Tensor:
        # The fused attention has no rule for many texts with a gradient each.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.cat([every(part) for part in torch.split(texts, _AT_ONCE)])

    return of_texts


def rebuild_text(
    mismatch: Mismatch,
    words: torch.Tensor,
    *,
    vocabulary: int,
    length: int,
    generator: torch.Generator,
    restarts: int = 8,
) -> Rebuilt:
    """Return the text of the smallest mismatch that is found by changing, swapping and moving one word at a time.

    Args:
        mismatch: From `update_mismatch`.
        words: Those to try, such as the nearest ones of the span test, shape (words,).
        vocabulary: Words of the model. At the last place all are tried: the last word is predicted and never read, so
            that it leaves no trace in the span.
        length: Words of the text, L.
        generator: For where each search begins.
        restarts: Searches, at most.
    """
    best = Rebuilt((), 2.0)
    for _ in range(restarts):
        begin = words[torch.randint(len(words), (length,), generator=generator)]
        found = _descend(mismatch, begin, words, vocabulary, generator)
        best = min(best, found, key=lambda each: each.mismatch)
        if best.mismatch < _FOUND:
            break
    return best


def _descend(
    mismatch: Mismatch, text: torch.Tensor, words: torch.Tensor, vocabulary: int, generator: torch.Generator
) -> Rebuilt:
    """Return where a search ends that takes the best change at one place after another, until none helps."""
    least, before = float(mismatch(text[None])[0]), 3.0
    while least < before - _STEP:
        before = least
        for place in torch.randperm(len(text), generator=generator).tolist():
            text, least = _best(mismatch, text, least, _neighbours(text, place, words))
        if least >= before - _STEP:
            # The dear one comes last: every word of the vocabulary.
            changed = text.repeat(vocabulary, 1)
            changed[:, -1] = torch.arange(vocabulary)
            text, least = _best(mismatch, text, least, changed)
    return Rebuilt(tuple(text.tolist()), least)


def _best(mismatch: Mismatch, text: torch.Tensor, least: float, tried: torch.Tensor) -> tuple[torch.Tensor, float]:
    values = mismatch(tried)
    return (tried[int(values.argmin())], float(values.min())) if float(values.min()) < least else (text, least)


def _neighbours(text: torch.Tensor, place: int, words: torch.Tensor) -> torch.Tensor:
    """Return the texts with another word at a place, with it swapped for each other, and with it moved elsewhere."""
    changed = text.repeat(len(words), 1)
    changed[:, place] = words
    found = [changed]
    for other in range(len(text)):
        if other != place:
            swapped = text.clone()
            swapped[[place, other]] = text[[other, place]]
            rest = torch.cat([text[:place], text[place + 1 :]])
            moved = torch.cat([rest[:other], text[place : place + 1], rest[other:]])
            found.append(torch.stack([swapped, moved]))
    return torch.cat(found)


def _norm(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([value.square().sum() for value in tensors.values()]).sum().sqrt()
