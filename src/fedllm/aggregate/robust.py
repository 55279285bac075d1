"""Rules that look at each update, so that a few dishonest parties cannot move the global state where they like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedllm.aggregate.lora import factors_of, sites

Tensors = dict[str, torch.Tensor]

_SMOOTHING = 1e-6
_ITERATIONS = 100
_NAMES = Literal["none", "NormClipping", "Median", "TrimmedMean", "Krum", "MultiKrum", "GeometricMedian", "FLTrust"]
# Which settings a rule has.
_OWN: dict[str, set[str]] = {
    "none": set(),
    "NormClipping": {"clip_norm"},
    "Median": {"num_malicious"},
    "TrimmedMean": {"num_malicious"},
    "Krum": {"num_malicious"},
    "MultiKrum": {"num_malicious"},
    "GeometricMedian": {"num_malicious"},
    "FLTrust": {"root_party"},
}
_OPTIONAL = {"clip_norm"}
# Rules that compare coordinates; of LoRA's product there are none as long as both factors move.
COORDINATEWISE = ("Median", "TrimmedMean")


class RobustSettings(BaseModel):
    """What is done instead of the mean where some parties may be dishonest."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: _NAMES = Field("none", description="The rule; `none` is the weighted mean.")
    num_malicious: int | None = Field(None, ge=1, description="How many dishonest parties the rule must bear.")
    clip_norm: float | None = Field(
        None, gt=0, description="NormClipping: the largest norm of an update; else the median of the round's updates."
    )
    root_party: str | None = Field(None, description="FLTrust: the party whose update is trusted.")

    @model_validator(mode="after")
    def _settings_of_the_rule(self) -> RobustSettings:
        given = {key for key in ("num_malicious", "clip_norm", "root_party") if getattr(self, key) is not None}
        if idle := sorted(given - _OWN[self.name]):
            raise ValueError(f"{', '.join(idle)} has no effect with {self.name}; leave it out")
        if missing := sorted(_OWN[self.name] - given - _OPTIONAL):
            raise ValueError(f"{self.name} needs {', '.join(missing)}; set it")
        return self

    def least_parties(self) -> int:
        """Return with how many answers at least the rule keeps its promise."""
        wrong = self.num_malicious or 0
        if self.name in ("Krum", "MultiKrum"):
            return 2 * wrong + 3
        return 2 * wrong + 1 if wrong else 2 if self.name == "FLTrust" else 1


@dataclass(frozen=True)
class Update:
    """A party's update, as the server sees it."""

    party: str
    weight: int
    tensors: Mapping[str, torch.Tensor]


def gram(before: Mapping[str, torch.Tensor], updates: Sequence[Update]) -> torch.Tensor:
    """Return the inner products of the updates, float64, shape (parties, parties).

    What has no factors counts as it is. Of a LoRA site of which one factor moves it is the effective update, the change
    of the product B A (its scale is the same for all): B' A' - B A = dB A' + B dA. Where both move, half of it is that,
    and half what the mean of factors takes in: dA and dB, each as long as the product of the usual other factor with
    it. A party that sends c B and A / c has the product of an honest one, and would ruin the mean.

    Args:
        before: The global state that the parties started from.
        updates: One per party.
    """
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    in_sites = set()
    for left, right in sites(before).values():
        in_sites |= {left, right}
        parts = [factors_of(before, update.tensors, left, right) for update in updates]
        tall = torch.cat([torch.cat([d_left, before[left].double()], dim=1) for d_left, _, _ in parts], dim=1)
        wide = torch.cat([torch.cat([new_right, d_right]) for _, d_right, new_right in parts])
        effective = _blocks(tall, wide, len(updates))
        both = left in updates[0].tensors and right in updates[0].tensors
        total += (effective + _of_factors(before[left].double(), parts)) / 2 if both else effective
    for name in updates[0].tensors.keys() - in_sites:
        total += _inner([update.tensors[name].double() for update in updates])
    return total


def _of_factors(left: torch.Tensor, parts: Sequence[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Return inner products of the changes of both factors, each scaled by the parties' median of the other's size."""
    rank = left.shape[1]
    size_left = torch.stack([(left + d_left).square().sum() for d_left, _, _ in parts]).median() / rank
    size_right = torch.stack([new_right.square().sum() for _, _, new_right in parts]).median() / rank
    changes = [(d_left, d_right) for d_left, d_right, _ in parts]
    return size_right * _inner([one for one, _ in changes]) + size_left * _inner([other for _, other in changes])


def _inner(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    flat = torch.stack([tensor.reshape(-1) for tensor in tensors])
    return flat @ flat.T


def _blocks(tall: torch.Tensor, wide: torch.Tensor, count: int) -> torch.Tensor:
    """Return <L_i R_i, L_j R_j> for L = [L_1 ... L_n] and R = [R_1; ...; R_n]."""
    rank = tall.shape[1] // count
    products = (tall.T @ tall) * (wide @ wide.T)
    return products.reshape(count, rank, count, rank).sum(dim=(1, 3))


def squared_distances(inner: torch.Tensor) -> torch.Tensor:
    """Return |u_i - u_j|^2 from inner products, same shape.

    Args:
        inner: From `gram`.
    """
    norms = inner.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * inner).clamp_min(0)


def krum_scores(inner: torch.Tensor, num_malicious: int) -> torch.Tensor:
    """Return each update's sum of squared distances to its n - f - 2 nearest others, shape (parties,).

    Source: Blanchard et al. 2017, arXiv:1703.02757, section 4.

    Args:
        inner: From `gram`.
        num_malicious: f.
    """
    distances = squared_distances(inner)
    distances.fill_diagonal_(torch.inf)
    nearest = distances.sort(dim=1).values[:, : len(inner) - num_malicious - 2]
    return nearest.sum(dim=1)


def _krum(inner: torch.Tensor, updates: Sequence[Update], settings: RobustSettings) -> torch.Tensor:
    scores = krum_scores(inner, settings.num_malicious or 0)
    return torch.nn.functional.one_hot(scores.argmin(), len(updates)).double()


def _multi_krum(inner: torch.Tensor, updates: Sequence[Update], settings: RobustSettings) -> torch.Tensor:
    """The mean of the n - f updates of lowest score (section 5 of Krum's paper, m = n - f)."""
    wrong = settings.num_malicious or 0
    best = krum_scores(inner, wrong).argsort(stable=True)[: len(updates) - wrong]
    return torch.zeros(len(updates), dtype=torch.float64).index_fill(0, best, 1 / len(best))


def _geometric_median(inner: torch.Tensor, updates: Sequence[Update], settings: RobustSettings) -> torch.Tensor:
    """Smoothed Weiszfeld, Pillutla et al. 2022, arXiv:1912.13445, algorithm 2, until it stands; in inner products."""
    shares = _shares(updates)
    # The smoothing is a part of the size of the updates, so that it fits small ones.
    floor = _SMOOTHING * float(inner.diagonal().max().sqrt()) or _SMOOTHING
    found = shares
    for _ in range(_ITERATIONS):
        squared = inner.diagonal() - 2 * inner @ found + found @ inner @ found
        pulled = shares / squared.clamp_min(0).sqrt().clamp_min(floor)
        pulled = pulled / pulled.sum()
        if float((pulled - found).abs().max()) < 1e-9:
            break
        found = pulled
    return found


def _norm_clipping(inner: torch.Tensor, updates: Sequence[Update], settings: RobustSettings) -> torch.Tensor:
    """Sun et al. 2019, arXiv:1911.07963, section 4: each update times min(1, c / norm).

    Differs: c may be the median norm. It falls with the learning rate, as a bound that is the same in each round does
    not, and with fewer than half of the parties dishonest it lies among honest norms.
    """
    norms = inner.diagonal().sqrt().clamp_min(1e-300)
    limit = settings.clip_norm or float(norms.median())
    return _shares(updates) * (limit / norms).clamp_max(1)


def _fltrust(inner: torch.Tensor, updates: Sequence[Update], settings: RobustSettings) -> torch.Tensor:
    """Cao et al. 2021, arXiv:2012.13995, equations 1 to 4, with a party's update in place of the server's own."""
    root = [update.party for update in updates].index(str(settings.root_party))
    norms = inner.diagonal().sqrt().clamp_min(1e-300)
    trust = (inner[root] / (norms[root] * norms)).clamp_min(0)
    return trust * norms[root] / norms / trust.sum().clamp_min(1e-300)


def _shares(updates: Sequence[Update]) -> torch.Tensor:
    weights = torch.tensor([update.weight for update in updates], dtype=torch.float64)
    return weights / weights.sum()


_WEIGHTS: dict[str, Callable[[torch.Tensor, Sequence[Update], RobustSettings], torch.Tensor]] = {
    "Krum": _krum,
    "MultiKrum": _multi_krum,
    "GeometricMedian": _geometric_median,
    "NormClipping": _norm_clipping,
    "FLTrust": _fltrust,
}


def robust_mean(before: Mapping[str, torch.Tensor], updates: Sequence[Update], settings: RobustSettings) -> Tensors:
    """Return what takes the mean update's place, float32.

    Median and TrimmedMean (Yin et al. 2018, arXiv:1803.01498, definitions 1 and 2) compare coordinates; the others
    choose a weight for each update by the distances between updates, see `gram`. The order of `updates`
    makes no difference beyond rounding: the caller keeps one order.

    Args:
        before: The global state that the parties started from.
        updates: As many as `least_parties` at least.
        settings: The rule.
    """
    if settings.name in COORDINATEWISE:
        cut = settings.num_malicious or 0 if settings.name == "TrimmedMean" else (len(updates) - 1) // 2
        return {name: _trimmed(torch.stack([u.tensors[name] for u in updates]), cut) for name in updates[0].tensors}
    weights = _WEIGHTS[settings.name](gram(before, updates), updates, settings)
    return weighted_sum(updates, weights.tolist())


def _trimmed(values: torch.Tensor, cut: int) -> torch.Tensor:
    """Return the mean over the first dimension without the `cut` smallest and largest; the median at most."""
    return values.double().sort(dim=0).values[cut : len(values) - cut].mean(dim=0).float()


def weighted_sum(updates: Sequence[Update], weights: Sequence[float]) -> Tensors:
    """Return the sum of `weight * update`, float32, summed in float64 in the given order.

    Args:
        updates: One per party.
        weights: One per update. Where it is 0 the update is not looked at.
    """
    chosen = [(update, weight) for update, weight in zip(updates, weights, strict=True) if weight]
    sums: dict[str, Any] = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in updates[0].tensors.items()}
    for update, weight in chosen:
        for name, tensor in update.tensors.items():
            sums[name] += weight * tensor.double()
    return {name: total.float() for name, total in sums.items()}
