"""Which LoRA factors move in a round, and how far the mean of factors is from the mean of their products."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedllm.aggregate.rules import LoraRule
from fedllm.seeds import stream

Tensors = dict[str, torch.Tensor]
_ROUNDING = 1e-6
# Numbers of a site's sketch, at most: the meter must not cost what codecs save.
_SKETCH = 32

# The factor that is drawn at random at the start, and the one that starts at zero. On embeddings they swap names.
_DRAWN = re.compile(r"\.lora_(A|embedding_B)\.")
_ZERO = re.compile(r"\.lora_(B|embedding_A)\.")
_FACTOR = re.compile(r"\.lora_(embedding_)?[AB]\.")
_RIGHT = re.compile(r"\.lora_(embedding_)?A\.")


def moving(rule: LoraRule, names: Iterable[str], number: int) -> list[str]:
    """Return which tensors are trained in a round.

    FFA-LoRA (Sun et al. 2024, arXiv:2403.12313, section 3) never moves the random factor. RoLoRA (Chen et al. 2024,
    arXiv:2409.02346, algorithm 1) moves the other one in odd rounds and the random one in even rounds. With one factor
    fixed, the mean of the other is the mean of the products, exactly. What is no LoRA factor moves in every round.

    Args:
        rule: The rule.
        names: All trained tensors.
        number: The round, from 1 on.
    """
    fixed = {"FFA-LoRA": _DRAWN, "RoLoRA": _DRAWN if number % 2 else _ZERO}.get(rule)
    return [name for name in names if fixed is None or not fixed.search(name)]


def travelling(rule: LoraRule, names: Iterable[str]) -> list[str]:
    """Return which tensors the parties are sent; the others follow from the job's seed, or stay at their party.

    FedSA-LoRA (Guo et al. 2024, arXiv:2410.01463) shares the random factor, and each party keeps the other.
    FLoRA draws both afresh in each round.

    Args:
        rule: The rule.
        names: All trained tensors.
    """
    stays = {"FFA-LoRA": _DRAWN, "FedSA-LoRA": _ZERO, "FLoRA": _FACTOR}.get(rule)
    return [name for name in names if stays is None or not stays.search(name)]


def answered(rule: LoraRule, names: Iterable[str], number: int) -> list[str]:
    """Return which tensors a party's answer brings the change of.

    Args:
        rule: The rule.
        names: All trained tensors.
        number: The round, from 1 on.
    """
    return [name for name in moving(rule, names, number) if rule != "FedSA-LoRA" or not _ZERO.search(name)]


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
            # AdaLoRA has a third factor between the two.
            if left in known and (".lora_A." not in name or name.replace(".lora_A.", ".lora_E.") not in known):
                found[name[: match.start()]] = (left, name)
    return found


def sketch_size(rows: int) -> int:
    """Return how many numbers a site's sketch has.

    Args:
        rows: Of its factor B.
    """
    return min(rows, _SKETCH)


def sketch(tensors: Mapping[str, torch.Tensor], *, seed: int, number: int) -> Tensors:
    """Return V B (A w) of every site, for a Gaussian vector w and rows of signs V that all parties draw alike.

    Shape (`sketch_size`,). It is linear in the product, so that a sum of sketches is that of the sum.

    Args:
        tensors: The trained tensors.
        seed: The job's seed.
        number: The round.
    """
    return {
        site: _probe(site, tensors[left], tensors[right], seed, number).of(tensors[left], tensors[right]).float()
        for site, (left, right) in sites(tensors).items()
    }


@dataclass(frozen=True)
class _Probe:
    """A site's random numbers of one round: w, shape (columns of A,), and V, or None where B has few rows."""

    right: torch.Tensor
    left: torch.Tensor | None

    def of(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return V B (A w), float64."""
        found = left.double() @ (right.double() @ self.right)
        return found if self.left is None else self.left @ found


def _probe(site: str, left: torch.Tensor, right: torch.Tensor, seed: int, number: int) -> _Probe:
    draws = stream(seed, "drift", number, site)
    gaussian, rows, size = draws.standard_normal(right.shape[1]), left.shape[0], sketch_size(left.shape[0])
    if size == rows:
        return _Probe(torch.from_numpy(gaussian), None)
    signs = draws.integers(0, 2, (size, rows), dtype=np.int8) * 2.0 - 1.0
    return _Probe(torch.from_numpy(gaussian), torch.from_numpy(signs / size**0.5))


def drift(
    mean_sketch: Mapping[str, torch.Tensor],
    before: Mapping[str, torch.Tensor],
    update: Mapping[str, torch.Tensor],
    *,
    seed: int,
    number: int,
) -> float | None:
    """Return the bias of the mean of factors, as a share of the round's change; None if nothing changed.

    That is |sum p_i B_i A_i - B A| / |sum p_i B_i A_i - B' A'| in the Frobenius norm, with the parties' mean (A, B) and
    the last round's (A', B'), estimated with one Gaussian vector and some rows of signs for each site:
    E |V M w|^2 = |M|_F^2. One site is looked at at a time.

    Args:
        mean_sketch: Weighted mean of the parties' `sketch`.
        before: The global state that the parties started from.
        update: The mean of their updates.
        seed: The job's seed.
        number: The round.
    """
    bias = change = size = 0.0
    for site, (left, right) in sites(before).items():
        probe = _probe(site, before[left], before[right], seed, number)
        was = probe.of(before[left], before[right])
        now = probe.of(before[left] + update[left], before[right] + update[right])
        met = mean_sketch[site].double()
        bias += float((met - now).square().sum())
        change += float((met - was).square().sum())
        size += float(met.square().sum())
    # Below that the difference is the rounding of what travelled.
    return math.sqrt(bias / change) if change > _ROUNDING**2 * size else None


def factors_of(
    before: Mapping[str, torch.Tensor], update: Mapping[str, torch.Tensor], left: str, right: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a site's change of B, change of A, and A after it, float64; what did not move has a change of 0.

    Args:
        before: The global state.
        update: A party's update.
        left: Name of B.
        right: Name of A.
    """
    d_left, d_right = (
        update[name].double() if name in update else torch.zeros_like(before[name], dtype=torch.float64)
        for name in (left, right)
    )
    return d_left, d_right, before[right].double() + d_right


def party_factors(
    before: Mapping[str, torch.Tensor], update: Mapping[str, torch.Tensor], left: str, right: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a party's factors B and A of a site after its training, float64, with the slots that it owns.

    Args:
        before: The global state that it started from.
        update: Its update, of its own slots.
        left: Name of B.
        right: Name of A.
    """
    rank = update[left].shape[1]
    return before[left][:, :rank].double() + update[left], before[right][:rank].double() + update[right]


def truncated_product(
    before: Mapping[str, torch.Tensor], updates: Sequence[Mapping[str, torch.Tensor]], shares: Sequence[float]
) -> Tensors:
    """Return the change of all factors that makes each site's product the best one of its rank: FlexLoRA.

    The weighted sum of the parties' products, sum p_i B_i A_i, is cut to the rank of the site by its singular values,
    and split evenly: B = U sqrt(S), A = sqrt(S) V^T. The error is the norm of the values cut off.

    Source: Bai et al. 2024, arXiv:2402.11505, section 4. Differs: the decomposition is of the small core between the
    QR factors of the stacked B and A, never of the product itself.

    A party of a lower rank has the first slots, which are the best part of that rank: the singular values fall.

    Args:
        before: The global state.
        updates: The parties' updates, each of its own slots.
        shares: The parties' weights, 1 in all.
    """
    changes: Tensors = {}
    for left, right in sites(before).values():
        parts = [party_factors(before, update, left, right) for update in updates]
        scaled = [share * b for share, (b, _) in zip(shares, parts, strict=True)]
        q_left, r_left = torch.linalg.qr(torch.cat(scaled, dim=1))
        q_right, r_right = torch.linalg.qr(torch.cat([a for _, a in parts]).T)
        u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        rank = before[left].shape[1]
        root = s[:rank].sqrt()
        new_left, new_right = q_left @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ q_right.T
        if len(s) < rank:
            # A site that is smaller than its rank has no more directions than these.
            new_left = torch.nn.functional.pad(new_left, (0, rank - len(s)))
            new_right = torch.nn.functional.pad(new_right, (0, 0, 0, rank - len(s)))
        changes[left] = (new_left - before[left].double()).float()
        changes[right] = (new_right - before[right].double()).float()
    return changes
