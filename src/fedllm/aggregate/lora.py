"""Which LoRA factors move in a round, and how far the mean of factors is from the mean of their products."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from fedllm.seeds import stream

Tensors = dict[str, torch.Tensor]
LoraRule = Literal["FedIT", "FFA-LoRA", "RoLoRA"]

# The factor that is drawn at random at the start, and the one that starts at zero. On embeddings they swap names.
_DRAWN = re.compile(r"\.lora_(A|embedding_B)\.")
_ZERO = re.compile(r"\.lora_(B|embedding_A)\.")
_RIGHT = re.compile(r"\.lora_(embedding_)?A\.")


def moving(rule: LoraRule, names: Iterable[str], number: int) -> list[str]:
    """Return which tensors are trained and sent in a round.

    FFA-LoRA (Sun et al. 2024, arXiv:2403.12313, section 3) never moves the random factor. RoLoRA (Chen et al. 2024,
    arXiv:2409.02346, algorithm 1) moves the other one in odd rounds and the random one in even rounds. With one factor
    fixed, the mean of the other is the mean of the products, exactly. What is no LoRA factor moves in every round.

    Args:
        rule: The rule.
        names: All trained tensors.
        number: The round, from 1 on.
    """
    fixed = {"FedIT": None, "FFA-LoRA": _DRAWN, "RoLoRA": _DRAWN if number % 2 else _ZERO}[rule]
    return [name for name in names if fixed is None or not fixed.search(name)]


def travelling(rule: LoraRule, names: Iterable[str]) -> list[str]:
    """Return which tensors the parties must be sent; the others follow from the job's seed.

    Args:
        rule: The rule.
        names: All trained tensors.
    """
    return [name for name in names if rule != "FFA-LoRA" or not _DRAWN.search(name)]


def sites(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return where LoRA sits: site -> names of its factors B and A, whose product is the change of the weight.

    Args:
        names: Trained tensors.
    """
    known = set(names)
    found = {}
    for name in sorted(known):
        if match := _RIGHT.search(name):
            left = name[: match.start()] + match.group().replace("A", "B") + name[match.end() :]
            if left in known:
                found[name[: match.start()]] = (left, name)
    return found


def sketch(tensors: Mapping[str, torch.Tensor], *, seed: int, number: int) -> Tensors:
    """Return B (A w) of every site, for a Gaussian vector w that all parties draw alike; shape (rows of B,).

    Args:
        tensors: The trained tensors.
        seed: The job's seed.
        number: The round.
    """
    sketches = {}
    for site, (left, right) in sites(tensors).items():
        drawn = stream(seed, "drift", number, site).standard_normal(tensors[right].shape[1])
        probe = torch.from_numpy(drawn).to(torch.float64)
        product = tensors[left].double() @ (tensors[right].double() @ probe)
        sketches[site] = product.float()
    return sketches


def drift(
    mean_sketch: Mapping[str, torch.Tensor],
    before: Mapping[str, torch.Tensor],
    mean: Mapping[str, torch.Tensor],
    *,
    seed: int,
    number: int,
) -> float | None:
    """Return the bias of the mean of factors, as a share of the round's change; None if nothing changed.

    That is |sum p_i B_i A_i - B A| / |sum p_i B_i A_i - B' A'| in the Frobenius norm, with the parties' mean (A, B) and
    the last round's (A', B'), estimated with one Gaussian vector for each site: E |M w|^2 = |M|_F^2.

    Args:
        mean_sketch: Weighted mean of the parties' `sketch`.
        before: The global state that the parties started from.
        mean: The mean of what they came to.
        seed: The job's seed.
        number: The round.
    """
    was, now = (sketch(tensors, seed=seed, number=number) for tensors in (before, mean))
    bias = sum(float((mean_sketch[site] - now[site]).double().square().sum()) for site in mean_sketch)
    change = sum(float((mean_sketch[site] - was[site]).double().square().sum()) for site in mean_sketch)
    return math.sqrt(bias / change) if change else None
