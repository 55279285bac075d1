"""Tracing a leak: each party's copy of the tuned adapter differs a little, in a way that only the server can read.

Source: spread spectrum watermarks read with the original at hand (Cox et al. 1997, IEEE Transactions on Image
Processing 6(12), sections III and IV). Differs: the mark is in factor B of LoRA and is read from the product, so that
it survives merging and other factors of the same product; each site's change is fitted to the original first, so that
scaling the adapter takes nothing away; and the decision has an exact error probability.

Copy i has B + e rms(B) G_i, with G_i standard normal numbers drawn from the key, the recipient and the site. Of a
suspect with the change D at a site, H = e rms(B) (D - c D_0) A^T is what is left of it once the original D_0 = s B A is
taken away. The score of a recipient is

    z_i = sum over sites of w <H, G_i> / sqrt(sum over sites of w^2 |H|^2).

A recipient who had no part in the suspect has a G_i that is independent of H. Then z_i is standard normal, exactly,
whatever was done to the suspect: so P[z >= found] is the chance that an innocent one is named. The mean of several
copies scores for each of them, at 1/sqrt(k) of the score of one.

Shapes: R and K rows and columns of a site, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedllm.ownership.claims import MarkSite
from fedllm.seeds import stream
from fedllm.wire.payload import Tensors

# (site, X of shape (K, r)) -> D X, shape (R, r), with D the suspect's change of the base there.
Change = Callable[[MarkSite, torch.Tensor], torch.Tensor]
# A party is named where an innocent one would be with this chance at most, over all parties.
ERROR = 1e-6
_TINY = 1e-30


@dataclass(frozen=True)
class Original:
    """The adapter at a site before it was marked: D_0 = scale B A, with `b` (R, r) and `a` (r, K)."""

    site: MarkSite
    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Score:
    """A recipient's score; `p_value` is the chance that it is innocent and scores so high, times the recipients."""

    party: str
    z: float
    p_value: float


@dataclass(frozen=True)
class Trace:
    """Whose copy a suspect came from. `named` is empty where that is undecided."""

    scores: list[Score]
    named: tuple[str, ...]
    error: float

    @property
    def sentence(self) -> str:
        """The verdict."""
        if not self.named:
            return f"undecided: no party's copy scores above what an innocent one could with a chance of {self.error:g}"
        who, found = " and ".join(self.named), max(one.p_value for one in self.scores if one.party in self.named)
        verb = "copy is" if len(self.named) == 1 else "copies are"
        return f"the {verb} that of {who}; the chance that one of them is innocent is at most {found:.1e}"


def code(key: str, recipient: str, site: str, shape: Sequence[int]) -> torch.Tensor:
    """Return the standard normal numbers of a recipient at a site, float32 of the shape.

    Args:
        key: The server's, 32 random bytes, hex.
        recipient: The party.
        site: The site's name.
        shape: Of factor B, (R, r).
    """
    drawn = stream(int(key, 16), "trace", recipient, site).standard_normal(tuple(shape))
    found: torch.Tensor = torch.from_numpy(drawn).float()
    return found


def marked(tensors: Mapping[str, torch.Tensor], recipient: str, *, key: str, strength: float) -> Tensors:
    """Return a recipient's copy of an adapter; all but LoRA's factors B are as they were.

    Args:
        tensors: The adapter, by parameter name.
        recipient: The party.
        key: The server's.
        strength: Size of the mark beside factor B's, such as 0.05.
    """
    copy = dict(tensors)
    for name, tensor in tensors.items():
        if (site := site_name(name)) is not None:
            size = strength * float(tensor.float().square().mean().sqrt())
            copy[name] = (tensor.float() + size * code(key, recipient, site, tensor.shape)).to(tensor.dtype)
    return copy


def site_name(name: str) -> str | None:
    """Return the site of a factor B by its parameter's name, in a model or in a PEFT file; None for others.

    Args:
        name: The parameter's name.
    """
    head, found, tail = name.partition(".lora_B.")
    return head.removeprefix("base_model.model.") if found and tail in ("weight", "default.weight") else None


def trace(change: Change, originals: Sequence[Original], parties: Sequence[str], *, key: str) -> Trace:
    """Return whose copy a suspect came from, or that it is undecided.

    Args:
        change: Reads the suspect.
        originals: The adapter before it was marked, by site.
        parties: All that got a copy.
        key: The server's.
    """
    left = [found for original in originals if (found := _left(change, original)) is not None]
    scores = []
    for party in parties:
        z = _score(left, party, key)
        scores.append(Score(party, z, min(1.0, len(parties) * 0.5 * math.erfc(z / math.sqrt(2)))))
    scores.sort(key=lambda score: -score.z)
    return Trace(scores, tuple(score.party for score in scores if score.p_value <= ERROR), ERROR)


def _left(change: Change, original: Original) -> tuple[str, torch.Tensor] | None:
    """Return what is left of a suspect at a site, weighted as it tells most; None where there is nothing to read.

    Of noise with equal size in all directions, the best weight is the mark's own size over the square of what is left.
    It depends on no code, so that the score of an innocent one stays standard normal.
    """
    found = change(original.site, original.a.T).double()
    a, b = original.a.double(), original.b.double()
    gram = a @ a.T
    expected = original.scale * b @ gram
    size = float(b.square().mean().sqrt())
    # <D, D_0> / <D_0, D_0>, by factors.
    fitted = float((found * b).sum()) / max(float((expected * b).sum()), _TINY)
    rest = found - fitted * expected
    square = float(rest.square().sum())
    # What is left of the original by itself is rounding, not a mark.
    if not math.isfinite(square) or square <= 1e-14 * float(expected.square().sum()) or not size:
        return None
    weight = size * float(gram.trace()) / square
    return original.site.name, weight * rest


def _score(left: Sequence[tuple[str, torch.Tensor]], party: str, key: str) -> float:
    total = square = 0.0
    for site, rest in left:
        total += float((rest * code(key, party, site, rest.shape).double()).sum())
        square += float(rest.square().sum())
    return total / math.sqrt(square) if square else 0.0
