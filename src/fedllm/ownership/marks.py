"""White-box marks: secret bits in what a job trains, put there by a pull on the parameters that reads no data.

Source: FedIPR (Li et al. 2022, arXiv:2109.13236), section 4.1: the hinge term a * sum_j max(mu - b_j t_j, 0) beside the
loss. Differs: t_j is read from the change to the base model. In LoRA's product it is

    t_j = sum over sites of u_j^T (s B A) v_j      with secret random unit vectors u_j, v_j per site,

which no other choice of factors changes, and which stays in merged weights; in the norms' scales it is e_j^T (g - g_0).
The term's gradient joins that of the loss after clipping, and after the noise of private training: it depends on the
key and the parameters alone.

Shapes: N bits of a mark, R and K rows and columns of a site, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from fedllm.models.adapter import TunableModel
from fedllm.ownership.claims import Claim, MarkSite
from fedllm.ownership.settings import Carrier, OwnershipSettings
from fedllm.seeds import stream

_LORA = re.compile(r"^base_model\.model\.(.+)\.lora_A\.default\.weight$")
_NORM = re.compile(r"^(?:base_model\.model\.)?(.+?)(?:\.(?:ln_tuning_layers|modules_to_save)\.default)?\.weight$")
_Parameters = Mapping[str, torch.Tensor]


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


def unit_rows(claim: Claim, site: MarkSite, side: str) -> torch.Tensor:
    """Return a mark's secret unit vectors at a site, (N, R) or (N, K).

    Args:
        claim: For the key and the number of bits.
        site: The site.
        side: `rows` or `columns`.
    """
    size = site.rows if side == "rows" else site.columns
    drawn = stream(int(claim.key_seed, 16), "mark", site.name, side).standard_normal((len(claim.bits), size))
    rows: torch.Tensor = torch.nn.functional.normalize(torch.from_numpy(drawn).float(), dim=1)
    return rows


def scale_rows(claim: Claim, site: MarkSite) -> torch.Tensor:
    """Return a mark's secret vectors at a norm, (N, R); over all sites together they have about unit length.

    Args:
        claim: For the key, the number of bits, and the other sites.
        site: The site.
    """
    total = sum(one.rows for one in claim.sites)
    drawn = stream(int(claim.key_seed, 16), "mark", site.name, "scale").standard_normal((len(claim.bits), site.rows))
    return torch.from_numpy(drawn).float() / total**0.5


@dataclass(frozen=True)
class _Product:
    """A site's part of t: s (U B) * (V A^T), summed over the rank; `left` U is (N, R), `right` V (N, K)."""

    a: str
    b: str
    scale: float
    left: torch.Tensor
    right: torch.Tensor

    def part(self, parameters: _Parameters) -> torch.Tensor:
        a, b = parameters[self.a].float(), parameters[self.b].float()
        return self.scale * ((self.left @ b) * (self.right @ a.T)).sum(1)


@dataclass(frozen=True)
class _Scale:
    """A norm's part of t: E (g - g_0); `base` g_0 is (R,), `key` E (N, R)."""

    name: str
    base: torch.Tensor
    key: torch.Tensor

    def part(self, parameters: _Parameters) -> torch.Tensor:
        return self.key @ (parameters[self.name].float() - self.base)


class Mark:
    """One claimant's mark on a model that is being trained.

    Args:
        claim: The claim; its sites are the carrier's.
        tunable: The model with its tuning method.
        base: The first values of what is trained; norms are read against them.
    """

    def __init__(self, claim: Claim, tunable: TunableModel, base: _Parameters) -> None:
        self._trainable = tunable.trainable
        device = next(iter(tunable.trainable.values())).device
        self._signs = torch.tensor(claim.signs(), dtype=torch.float32, device=device)
        parts = _products(claim, tunable) if claim.carrier == "product" else _norms(claim, tunable, base)
        self._parts = [_to(part, device) for part in parts]

    def readings(self, parameters: _Parameters | None = None) -> torch.Tensor:
        """Return t, (N,): bit j is read as 1 where it is above zero.

        Args:
            parameters: Other values of what is trained than those of the model.
        """
        values = self._trainable if parameters is None else parameters
        return torch.stack([part.part(values) for part in self._parts]).sum(0)

    def pull(self, settings: OwnershipSettings) -> Callable[[float], None]:
        """Return what adds the gradient of a * sum_j max(mu - b_j t_j, 0) to that of a step.

        Args:
            settings: The strength a, and the margin mu.
        """

        def correct(rate: float) -> None:
            moving = [value for value in self._trainable.values() if value.requires_grad and value.grad is not None]
            short = (settings.margin - self._signs * self.readings()).clamp_min(0)
            if not bool(short.any()):
                return
            found = torch.autograd.grad(settings.strength * short.sum(), moving, allow_unused=True)
            for value, part in zip(moving, found, strict=True):
                if part is not None and value.grad is not None:
                    value.grad.add_(part)

        return correct


def _products(claim: Claim, tunable: TunableModel) -> Iterator[_Product]:
    for site in claim.sites:
        head = f"base_model.model.{site.name}"
        scale = float(tunable.model.get_submodule(head).scaling["default"])
        left, right = unit_rows(claim, site, "rows"), unit_rows(claim, site, "columns")
        yield _Product(f"{head}.lora_A.default.weight", f"{head}.lora_B.default.weight", scale, left, right)


def _norms(claim: Claim, tunable: TunableModel, base: _Parameters) -> Iterator[_Scale]:
    names = _scales(tunable)
    for site in claim.sites:
        name = names[site.name][0]
        yield _Scale(name, base[name].float(), scale_rows(claim, site))


def _to(part: _Product | _Scale, device: torch.device) -> _Product | _Scale:
    if isinstance(part, _Product):
        return _Product(part.a, part.b, part.scale, part.left.to(device), part.right.to(device))
    return _Scale(part.name, part.base.to(device), part.key.to(device))
