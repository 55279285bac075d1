"""White-box marks: secret bits in what a job trains, put there by a pull on the parameters that reads no data.

Source: FedIPR (Li et al. 2022, arXiv:2109.13236), section 4.1: bit j is the sign of t_j, held there by the hinge term
a * sum_j max(mu - b_j t_j, 0) beside the loss. Differs in three things. First, t_j is read from the change to the base
model. In LoRA's product it is

    t_j = sum over sites of u_j^T (s B A) v_j      with secret random unit vectors u_j, v_j per site,

which no other choice of factors changes, and which stays in merged weights; in the norms' scales it is e_j^T (g - g_0).
Second, the term moves the parameters by steps of its own, each as long as makes up a share a of what a bit lacks: an
optimiser such as AdamW scales any gradient to its learning rate, and would push t_j to forty times mu, or not at all.
Third, mu grows with what is tuned: beside the job's margin it has four standard deviations of what a random key reads;
fewer where the marks fill much of the carrier, because they are a part of those deviations themselves.

The steps depend on the key and the parameters alone, so private training needs no noise on them.

Shapes: N bits of a mark, R and K rows and columns of a site, r rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from fedllm.models.adapter import TunableModel
from fedllm.ownership.claims import DRAWN, Claim, MarkSite
from fedllm.ownership.settings import Carrier, OwnershipSettings
from fedllm.seeds import stream

_LORA = re.compile(r"^base_model\.model\.(.+)\.lora_A\.default\.weight$")
_NORM = re.compile(r"^(?:base_model\.model\.)?(.+?)(?:\.(?:ln_tuning_layers|modules_to_save)\.default)?\.weight$")
# Of what a random key reads: so far each bit is held off zero, beside the job's margin.
_DEVIATIONS = 4.0
# Largest share of a margin that the marks' own part of those deviations may make up; at 1 it would grow without end.
_OWN_SHARE = 0.5


def mark_sites(tunable: TunableModel, carrier: Carrier) -> tuple[MarkSite, ...]:
    """Return where a carrier's bits can sit in what a job trains, in the order of the model.

    Args:
        tunable: The model with its tuning method; a skeleton will do.
        carrier: The carrier.
    """
    if carrier == "product":
        return tuple(_product_site(tunable, name) for name in _factors(tunable))
    if carrier == "norms":
        return tuple(MarkSite(name=site, rows=spec[0], columns=1) for site, (_, spec) in _scales(tunable).items())
    return ()


def _factors(tunable: TunableModel) -> list[str]:
    return [found[1] for name in tunable.manifest if (found := _LORA.match(name))]


def _product_site(tunable: TunableModel, site: str) -> MarkSite:
    a, b = (tunable.manifest[f"base_model.model.{site}.lora_{factor}.default.weight"].shape for factor in "AB")
    layer = tunable.model.get_submodule(f"base_model.model.{site}")
    return MarkSite(name=site, rows=b[0], columns=a[1], transposed=bool(getattr(layer, "fan_in_fan_out", False)))


def _scales(tunable: TunableModel) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return site -> (parameter, shape) of each norm's scale that is trained."""
    found = {}
    for name, spec in tunable.manifest.items():
        module = tunable.model.get_submodule(name.rpartition(".")[0])
        if len(spec.shape) == 1 and name.endswith(".weight") and "norm" in type(module).__name__.lower():
            match = _NORM.match(name)
            found[match[1] if match else name] = (name, tuple(spec.shape))
    return found


def num_free(sites: tuple[MarkSite, ...], *, rank: int = 0, only_b: bool = False) -> int:
    """Return how many bits all claimants together may hide: the numbers of the carrier that can move freely.

    Source: FedIPR, theorem 1: all bits can be held while their number is at most that of the carrier's.

    Args:
        sites: The carrier's.
        rank: LoRA's; 0 for norms.
        only_b: Factor A stands still.
    """
    if not rank:
        return sum(site.rows for site in sites)
    return sum(rank * (site.rows if only_b else site.rows + site.columns - rank) for site in sites)


def _key_of(claim: Claim) -> int:
    if claim.form != DRAWN:
        raise ValueError("where the claim's bits are follows from its log: see `ownership.directions.directed`")
    return int(claim.key_seed, 16)


def unit_rows(claim: Claim, site: MarkSite, side: str) -> torch.Tensor:
    """Return a mark's secret unit vectors at a site, (N, R) or (N, K).

    Args:
        claim: For the key and the number of bits, as `directed` returns it.
        site: The site.
        side: `rows` or `columns`.
    """
    size = site.rows if side == "rows" else site.columns
    drawn = stream(_key_of(claim), "mark", site.name, side).standard_normal((len(claim.bits), size))
    rows: torch.Tensor = torch.nn.functional.normalize(torch.from_numpy(drawn).float(), dim=1)
    return rows


def scale_rows(claim: Claim, site: MarkSite) -> torch.Tensor:
    """Return a mark's secret vectors at a norm, (N, R); over all sites together they have about unit length.

    Args:
        claim: For the key, the number of bits, and the other sites.
        site: The site.
    """
    total = sum(one.rows for one in claim.sites)
    drawn = stream(_key_of(claim), "mark", site.name, "scale").standard_normal((len(claim.bits), site.rows))
    rows: torch.Tensor = torch.from_numpy(drawn).float() / math.sqrt(total)
    return rows


@dataclass(frozen=True)
class _Product:
    """A site's part of t: s (U B) * (V A^T), summed over the rank; `left` U is (N, R), `right` V (N, K)."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    left: torch.Tensor
    right: torch.Tensor

    def sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return U B and V A^T, (N, r) both, the scale in the first."""
        return self.scale * (self.left @ self.b.detach().float()), self.right @ self.a.detach().float().T

    def part(self) -> torch.Tensor:
        """Return the site's part of t, (N,)."""
        left, right = self.sides()
        return (left * right).sum(1)

    def square(self) -> torch.Tensor:
        """Return the squared length of t's gradient over what moves here, (N,)."""
        left, right = self.sides()
        found = torch.zeros(len(left), device=left.device)
        if self.b.requires_grad:
            found += self.scale**2 * right.square().sum(1)
        return found + left.square().sum(1) if self.a.requires_grad else found

    def variance(self) -> float:
        """Return the variance of what a random key reads here: |s B A|^2 / (R K)."""
        a, b = self.a.detach().float(), self.b.detach().float()
        square = float(((b.T @ b) * (a @ a.T)).sum())
        return self.scale**2 * square / (b.shape[0] * a.shape[1])

    def move(self, by: torch.Tensor) -> None:
        """Add the gradient of `by` (N,) times t to what moves."""
        left, right = self.sides()
        if self.b.requires_grad:
            self.b.data += (self.scale * self.left.T @ (by[:, None] * right)).to(self.b.dtype)
        if self.a.requires_grad:
            self.a.data += (left.T @ (by[:, None] * self.right)).to(self.a.dtype)


@dataclass(frozen=True)
class _Scale:
    """A norm's part of t: E (g - g_0); `base` g_0 is (R,), `key` E (N, R)."""

    g: torch.nn.Parameter
    base: torch.Tensor
    key: torch.Tensor

    def part(self) -> torch.Tensor:
        """Return the norm's part of t, (N,)."""
        return self.key @ (self.g.detach().float() - self.base)

    def square(self) -> torch.Tensor:
        """Return the squared length of t's gradient over what moves here, (N,)."""
        return self.key.square().sum(1) * float(self.g.requires_grad)

    def variance(self) -> float:
        """Return the variance of what a random key of this length reads here."""
        change = self.g.detach().float() - self.base
        return float(change.square().mean() * self.key.square().sum(1).mean())

    def move(self, by: torch.Tensor) -> None:
        """Add the gradient of `by` (N,) times t to what moves."""
        if self.g.requires_grad:
            self.g.data += (by @ self.key).to(self.g.dtype)


class Mark:
    """One claimant's mark on a model that is being trained.

    Args:
        claim: The claim; its sites are the carrier's.
        tunable: The model with its tuning method.
        base: The first values of what is trained; norms are read against them.
    """

    def __init__(self, claim: Claim, tunable: TunableModel, base: Mapping[str, torch.Tensor]) -> None:
        device = next(iter(tunable.trainable.values())).device
        self._signs = torch.tensor(claim.signs(), dtype=torch.float32, device=device)
        self._free = num_free(claim.sites, rank=tunable.peft.r or 0 if claim.carrier == "product" else 0)
        make = _product if claim.carrier == "product" else partial(_scale, base=base)
        self._parts = [make(claim, site, tunable, device) for site in claim.sites]

    def readings(self) -> torch.Tensor:
        """Return t, (N,): bit j is read as 1 where it is above zero."""
        return torch.stack([part.part() for part in self._parts]).sum(0)

    def noise(self) -> float:
        """Return the standard deviation of what a random key reads in the same parameters."""
        return math.sqrt(sum(part.variance() for part in self._parts))

    def pull(self, settings: OwnershipSettings) -> Callable[[float], None]:
        """Return what takes a step towards the bits, right before each step of the optimiser.

        Args:
            settings: The strength a, and the margin mu.
        """

        # N bits held at t by the shortest change, in C numbers that move freely, have a random key read about
        # t sqrt(N / (C - N)).
        bits = len(settings.claimants) * settings.num_bits
        filled = math.sqrt(bits / max(self._free - bits, 1))
        deviations = min(_DEVIATIONS, _OWN_SHARE / filled)

        def correct(rate: float) -> None:
            target = settings.margin + deviations * self.noise()
            short = (target - self._signs * self.readings()).clamp_min(0)
            square = torch.stack([part.square() for part in self._parts]).sum(0)
            # Where a factor is zero there is no way to move yet.
            by = torch.where(square > 0, settings.strength * self._signs * short / square.clamp_min(1e-12), 0.0)
            for part in self._parts:
                part.move(by)

        return correct


def _product(claim: Claim, site: MarkSite, tunable: TunableModel, device: torch.device) -> _Product | _Scale:
    head = f"base_model.model.{site.name}"
    a, b = (tunable.trainable[f"{head}.lora_{factor}.default.weight"] for factor in "AB")
    scale = float(tunable.model.get_submodule(head).scaling["default"])
    left, right = (unit_rows(claim, site, side).to(device) for side in ("rows", "columns"))
    return _Product(a, b, scale, left, right)


def _scale(
    claim: Claim, site: MarkSite, tunable: TunableModel, device: torch.device, *, base: Mapping[str, torch.Tensor]
) -> _Product | _Scale:
    name = _scales(tunable)[site.name][0]
    return _Scale(tunable.trainable[name], base[name].float().to(device), scale_rows(claim, site).to(device))
