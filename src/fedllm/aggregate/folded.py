"""What rules add to the base beside the adapter, as low-rank factors: kept exact, sent, and delivered.

Beside the factors B and A of a site stand L and R, and the model computes with W + s (B A + L R). They are called
`folded/SITE.left` and `folded/SITE.right` among the tensors of the global state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from fedllm.aggregate.lora import party_factors, sites
from fedllm.wire.frame import check_manifest
from fedllm.wire.payload import Manifest, TensorSpec

Tensors = dict[str, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
FOLDED = "folded/"
# Singular values below this share of the largest are zero to rounding, in float64.
_ZERO = 1e-12


def split(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, Tensors]:
    """Return the adapter, and what stands beside it.

    Args:
        tensors: The global state.
    """
    beside = {name: tensor for name, tensor in tensors.items() if name.startswith(FOLDED)}
    return {name: tensor for name, tensor in tensors.items() if name not in beside}, beside


def pairs(folded: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Pair]]:
    """Yield (site, (L, R)).

    Args:
        folded: From `split`.
    """
    for name in sorted(folded):
        if name.endswith(".left"):
            site = name.removeprefix(FOLDED).removesuffix(".left")
            yield site, (folded[name], folded[f"{FOLDED}{site}.right"])


def check_folded(folded: Mapping[str, torch.Tensor], manifest: Manifest, *, sender: str) -> None:
    """Return if what stands beside an adapter fits its sites.

    Args:
        folded: What was received.
        manifest: The adapter's.
        sender: Who sent it, for the error.

    Raises:
        PayloadError: `PAYLOAD_REFUSED`.
    """
    expected: Manifest = {}
    for site, (left, right) in sites(manifest).items():
        found = folded.get(f"{FOLDED}{site}.left")
        if found is not None:
            tall, wide = manifest[left].shape[0], manifest[right].shape[1]
            columns = min(found.shape[-1] if found.dim() else 0, tall, wide)
            expected[f"{FOLDED}{site}.left"] = TensorSpec(dtype="float32", shape=[tall, columns])
            expected[f"{FOLDED}{site}.right"] = TensorSpec(dtype="float32", shape=[columns, wide])
    check_manifest(folded, expected, sender=sender)


def residual(
    before: Mapping[str, torch.Tensor], updates: Sequence[Mapping[str, torch.Tensor]], shares: Sequence[float]
) -> dict[str, Pair]:
    """Return what the product of the mean factors lacks of the mean product, as factors by site: FedEx-LoRA.

    sum p_i B_i A_i - B A = sum_{i<N} p_i (B_i - B) (A_i - A_N), with the means A and B: the deviations of B have a mean
    of zero, so that the same matrix may be taken off every A_i. Its rank is (N - 1) r at most.

    Source: Singhal et al. 2024, arXiv:2410.09432. Differs: the residual is kept as factors, never as a
    matrix.

    Args:
        before: The global state.
        updates: The parties' updates, all of one rank.
        shares: The parties' weights, 1 in all.
    """
    found = {}
    for site, (left, right) in sites(before).items():
        parts = [party_factors(before, update, left, right) for update in updates]
        mean = _summed([share * b for share, (b, _) in zip(shares, parts, strict=True)])
        tall = [share * (b - mean) for share, (b, _) in zip(shares[:-1], parts, strict=False)]
        wide = [a - parts[-1][1] for _, a in parts[:-1]]
        if tall:
            found[site] = torch.cat(tall, dim=1), torch.cat(wide)
    return found


def stacked(
    before: Mapping[str, torch.Tensor], updates: Sequence[Mapping[str, torch.Tensor]], shares: Sequence[float]
) -> dict[str, Pair]:
    """Return the mean product, as factors by site: FLoRA. Ranks may differ.

    sum p_i B_i A_i = [p_1 B_1, ..., p_N B_N] [A_1; ...; A_N]: the share belongs to one of the two factors only.

    Source: Wang et al. 2024, arXiv:2409.05976. Differs: parties are sent the mean product
    as factors of its rank, not the stack.

    Args:
        before: The global state.
        updates: The parties' updates, each of its own slots.
        shares: The parties' weights, 1 in all.
    """
    found = {}
    for site, (left, right) in sites(before).items():
        parts = [party_factors(before, update, left, right) for update in updates]
        tall = [share * b for share, (b, _) in zip(shares, parts, strict=True)]
        found[site] = torch.cat(tall, dim=1), torch.cat([a for _, a in parts])
    return found


def _summed(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    return total


def folded_with(folded: Mapping[str, torch.Tensor], added: Mapping[str, Pair]) -> Tensors:
    """Return what stands beside the adapter after a round, in as few columns as it needs.

    Args:
        folded: What stood there before.
        added: What the round adds, by site.
    """
    known, tensors = dict(pairs(folded)), Tensors()
    for site in sorted(known.keys() | added.keys()):
        parts = [found[site] for found in (known, added) if site in found]
        left, right = recompressed(
            torch.cat([one.double() for one, _ in parts], dim=1), torch.cat([one.double() for _, one in parts])
        )
        if left.shape[1]:
            tensors |= {f"{FOLDED}{site}.left": left.float(), f"{FOLDED}{site}.right": right.float()}
    return tensors


def recompressed(left: torch.Tensor, right: torch.Tensor) -> Pair:
    """Return factors of the same product with as many columns and rows as its rank, split evenly.

    By the singular values of the core between the QR factors; what is left out is zero to rounding.

    Args:
        left: Shape (d, m), float64.
        right: Shape (m, k), float64.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    rank = int((s > _ZERO * s.max()).sum()) if len(s) else 0
    root = s[:rank].sqrt()
    return q_left @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ q_right.T


def product_norm(found: Mapping[str, Pair]) -> float:
    """Return the Frobenius norm over all sites' products, without making one of them.

    Args:
        found: Factors by site, float64.
    """
    squares = (float(((left.T @ left) * (right @ right.T)).sum()) for left, right in found.values())
    return math.sqrt(max(0.0, sum(squares)))


def complete(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return the global state as one adapter of a higher rank: B = [B, L], A = [A; R].

    All sites get one rank; those that need less have zeros. Where the adapter's own product is zero everywhere, which
    it is after each round of FLoRA, its slots are left out. What stands at sites without an adapter, in the middle of
    an emulator, becomes one there.

    Args:
        tensors: The global state.
    """
    adapter, folded = split(tensors)
    if not folded:
        return adapter
    beside, places = dict(pairs(folded)), sites(adapter)
    is_used = any(bool(adapter[left].any()) for left, _ in places.values())
    names = ("lora_B.default.weight", "lora_A.default.weight")
    places |= {site: (f"{site}.{names[0]}", f"{site}.{names[1]}") for site in added_sites(tensors)}
    columns: dict[str, Pair] = {}
    for site, (left, right) in places.items():
        own = [(adapter[left], adapter[right])] if is_used and left in adapter else []
        parts = [*own, *([beside[site]] if site in beside else [])] or [(adapter[left][:, :0], adapter[right][:0])]
        columns[site] = torch.cat([b for b, _ in parts], dim=1), torch.cat([a for _, a in parts])
    rank = max(left.shape[1] for left, _ in columns.values())
    for site, (left, right) in places.items():
        b, a = columns[site]
        adapter[left] = torch.nn.functional.pad(b, (0, rank - b.shape[1]))
        adapter[right] = torch.nn.functional.pad(a, (0, 0, 0, rank - a.shape[0]))
    return adapter


def added_sites(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return where something stands beside a layer that has no adapter, in order.

    Args:
        tensors: The global state.
    """
    adapter, folded = split(tensors)
    return [site for site, _ in pairs(folded) if site not in sites(adapter)]


def grown_bytes(manifest: Manifest, columns: int) -> int:
    """Return the size of what stands beside an adapter, where so many columns were added to each site in all.

    Args:
        manifest: The adapter's.
        columns: Over all rounds.
    """
    total = 0
    for left, right in sites(manifest).values():
        tall, wide = manifest[left].shape[0], manifest[right].shape[1]
        total += 4 * (tall + wide) * min(columns, tall, wide)
    return total
