"""A text rebuilt from one step's update: of all texts, the one whose own update points the same way.

Shapes: N texts tried at once, L words of the text.

Source: Zhu et al. 2019, DLG, arXiv:1906.08935, algorithm 1; the cosine of Geiping et al. 2020, arXiv:2003.14053,
equation 4, tensor by tensor. Differs: not embeddings are moved along a gradient, but words are tried, which the span
test may have narrowed down; so a mismatch of zero is the text itself. It works too where the span test alone does not:
where the rank is small, in the order of the words, under AdamW, and of models and methods that give no span.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedllm.models.quiet import no_look_for_padding

# (texts, int64, shape (N, L)) -> mismatch of each, shape (N,)
Mismatch = Callable[[torch.Tensor], torch.Tensor]
# Texts at once, where that is no more than so many numbers of gradients.
_AT_ONCE, _MOST_NUMBERS = 128, 2**26
# What torch.func and models raise where the two do not go together.
_MISFITS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError)
# Below this a text is taken for the one that was looked for.
_FOUND = 1e-5
# A smaller gain is rounding, and so are tensors that are smaller than this share of the largest.
_STEP, _ROUNDING = 1e-6, 1e-4


@dataclass(frozen=True)
class Rebuilt:
    """The best text found, and its mismatch: 1 less the mean cosine of its update and the one seen; 0: that text."""

    text: tuple[int, ...]
    mismatch: float


def update_mismatch(
    model: nn.Module,
    start: Mapping[str, torch.Tensor],
    update: Mapping[str, torch.Tensor],
    *,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    given: int = 1,
    labels: int = 0,
) -> Mismatch:
    """Return how badly the update of a text fits the one seen: 1 - cosine, in [0, 2], the mean over the tensors.

    Of a classifier's text that is with the label that fits best.

    Args:
        model: The base model with an adapter of the right kind; what it holds is not looked at.
        start: What training started from, by parameter name.
        update: What one step on one text made of it, less the start.
        optimizer: Who made the step. AdamW's first step is the sign of the gradient.
        given: Words at the beginning of the text that are no targets, at least 1.
        labels: Of a classifier how many labels there are; 0 for a causal language model.
    """
    seen = _telling(update)
    fixed = {name: value.detach() for name, value in model.named_parameters() if name not in start}
    begun = {name: value.detach() for name, value in start.items()}

    def loss(trained: dict[str, torch.Tensor], text: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        inputs: dict[str, Any] = {"input_ids": text[None]} | ({} if labels else {"use_cache": False})
        logits = functional_call(model, {**fixed, **trained}, (), inputs).logits[0].float()
        if labels:
            return nn.functional.cross_entropy(logits, label)
        # What stands before the text are virtual tokens.
        return nn.functional.cross_entropy(logits[-len(text) :][given - 1 : -1], text[given:])

    def mismatch(text: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        gradient = grad(loss)(begun, text, label)
        step = {name: -(value.sign() if optimizer == "adamw" else value) for name, value in gradient.items()}
        # Tensor by tensor: over all together, a head with large gradients would drown what the others say.
        cosines = [_cosine(step[name], value) for name, value in seen.items()]
        return 1 - torch.stack(cosines).mean()

    every = _at_once(mismatch, sum(value.numel() for value in begun.values()))

    def of_texts(texts: torch.Tensor) -> torch.Tensor:
        # The fused attention has no rule for many texts with a gradient each.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), no_look_for_padding(model):
            found = [every(texts, torch.tensor(label)) for label in range(max(1, labels))]
        return torch.stack(found).amin(dim=0)

    return of_texts


def _telling(update: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of an update that are more than rounding, as the bias of attention's keys is not."""
    sizes = {name: float(value.norm()) / max(1, value.numel()) ** 0.5 for name, value in update.items()}
    least = _ROUNDING * max(sizes.values())
    return {name: value.detach() for name, value in update.items() if sizes[name] > least}


def _at_once(mismatch: Callable[..., torch.Tensor], numbers: int) -> Callable[..., torch.Tensor]:
    """Return the function for many texts: together where the model allows it, else one after another."""
    size = max(1, min(_AT_ONCE, _MOST_NUMBERS // max(1, numbers)))
    together: list[Callable[..., torch.Tensor]] = [vmap(mismatch, in_dims=(0, None))]

    def every(texts: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if together:
            try:
                return torch.cat([together[0](part, label) for part in torch.split(texts, size)])
            except _MISFITS:
                together.clear()
        return torch.stack([mismatch(text, label) for text in texts])

    return every


class _Counted:
    """A mismatch that counts how many texts may still be tried."""

    def __init__(self, mismatch: Mismatch, most: int) -> None:
        self._mismatch, self._left = mismatch, most

    def __call__(self, texts: torch.Tensor) -> torch.Tensor:
        self._left -= len(texts)
        return self._mismatch(texts)

    @property
    def is_over(self) -> bool:
        return self._left <= 0


def rebuild_text(
    mismatch: Mismatch,
    words: torch.Tensor,
    *,
    last: torch.Tensor,
    length: int,
    generator: torch.Generator,
    most: int = 20_000,
) -> Rebuilt:
    """Return the text of the smallest mismatch that is found by changing, swapping and moving one word at a time.

    Args:
        mismatch: From `update_mismatch`.
        words: Those to try, such as the nearest ones of the span test, shape (words,).
        last: Those to try at the last place, such as all of the vocabulary: the last word is predicted and never read,
            so that it leaves no trace in the span.
        length: Words of the text, L.
        generator: For where each search begins.
        most: Texts to try, about: where a search ends without the text, another begins.
    """
    counted = _Counted(mismatch, most)
    best = Rebuilt((), 2.0)
    while best.mismatch > _FOUND and not counted.is_over:
        begin = words[torch.randint(len(words), (length,), generator=generator)]
        found = _descend(counted, begin, words, last, generator)
        best = min(best, found, key=lambda each: each.mismatch)
    return best


def _descend(
    mismatch: _Counted, text: torch.Tensor, words: torch.Tensor, last: torch.Tensor, generator: torch.Generator
) -> Rebuilt:
    """Return where a search ends that takes the best change at one place after another, until none helps."""
    least, before = float(mismatch(text[None])[0]), 3.0
    while least < before - _STEP:
        before = least
        for place in torch.randperm(len(text), generator=generator).tolist():
            if mismatch.is_over:
                return Rebuilt(tuple(text.tolist()), least)
            text, least = _best(mismatch, text, least, _neighbours(text, place, words))
        if least >= before - _STEP:
            # The dear one comes last: every word that may stand there.
            changed = text.repeat(len(last), 1)
            changed[:, -1] = last
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


def _cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = (first * second).sum() / (first.norm() * second.norm() + 1e-30)
    return found
