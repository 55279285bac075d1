"""Look for blocks of an owner's model in what others hold: the same tensor, nearly the same, a part, a quantised copy.

Matrices are compared as a whole, and line by line: a line is a row or a column.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fedllm.models.blocks import Cut, stacks
from fedllm.models.emulator import Slots
from fedllm.wire.payload import Tensors

# Two blocks of a trained model have cosines near 0. A copy in 4 bits, with scales that are not known, is above this.
NEAR = 0.8
_LEAST_VALUES = 64
# Lines of fewer values may be alike by chance; of longer ones 8 that are near to 8 others are none.
_LEAST_LENGTH = 32
_LEAST_LINES = 8
# Of a large matrix so many lines are looked for, evenly spread. A part of a quarter holds 15 of them or more.
_MOST_LINES = 64
# A line that is near to more than these tells of a direction that many lines share, not of a copy.
_FEW = 4
_CHUNK = 2**24
# What rounding to bfloat16 changes at most is half of this.
_BF16 = 2**-8
_LEAST_VECTOR = 16
_MOST_VECTORS = 64


@dataclass(frozen=True)
class Match:
    """A tensor that someone holds, and the secret one that it is like.

    Args:
        held: Its name there.
        secret: The secret one's name.
        how: `same`, or `near` with the cosine.
    """

    held: str
    secret: str
    how: str


def secret_tensors(model: torch.nn.Module, slots: Slots, cut: Cut) -> Tensors:
    """Return the tensors of the middle's blocks that no emulator was made of, by name.

    Args:
        model: The owner's.
        slots: Which blocks the emulator was made of.
        cut: Bottom and top.
    """
    found: Tensors = {}
    for path, blocks in stacks(model).items():
        for index in range(cut.bottom, len(blocks) - cut.top):
            if index not in slots[path]:
                found |= {f"{path}.{index}.{name}": p.detach() for name, p in blocks[index].named_parameters()}
    return found


def matches(held: Mapping[str, torch.Tensor], secret: Mapping[str, torch.Tensor], *, allowed: Tensors) -> list[Match]:
    """Return which of the tensors that someone holds are secret ones, or hold them or parts of them.

    A matrix is found as a whole by its cosine, turned and one beside the other in a longer tensor too, and by its
    lines: where eight or more of its rows, or of its columns, are near to as many of a tensor, in any order. Slices of
    tensors of more dimensions count as matrices. A vector is found where it differs by no more than rounding to
    bfloat16.

    Args:
        held: What someone holds, as it came: integers are read as codes of 8 or 4 bits too.
        secret: From `secret_tensors`.
        allowed: What others may hold; what is equal to it is no secret.
    """
    known = {_digest(tensor) for tensor in allowed.values()}
    digests = {d: name for name, t in secret.items() if t.numel() > 1 and (d := _digest(t)) not in known}
    own = {name: t for name, t in secret.items() if t.numel() > 1 and _digest(t) in digests}
    matrices = {name: t for name, t in own.items() if t.dim() > 1 and t.numel() >= _LEAST_VALUES}
    units = {name: _unit(t) for name, t in matrices.items()}
    books, vectors = _books(matrices), _vectors(own, allowed)
    found = []
    for name, tensor in held.items():
        digest = _digest(tensor)
        if digest in digests:
            found.append(Match(name, digests[digest], "same"))
            continue
        how = {other: f"near, cosine {value:.3f}" for other, value in _near(tensor, units)}
        if digest not in known:
            how = dict(_by_lines(tensor, books)) | dict(_by_vector(tensor, vectors)) | how
        found += [Match(name, other, text) for other, text in how.items()]
    return found


def _near(tensor: torch.Tensor, units: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
    for flat in _readings(tensor):
        for name, unit in units.items():
            for piece in _pieces(flat, unit.numel()):
                value = float(_normal(piece) @ unit)
                if abs(value) >= NEAR:
                    yield name, value
                    return


def _readings(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return a tensor's values in the ways they may be meant: row by row, column by column, as two codes in a byte."""
    flat = tensor.detach().cpu().float().reshape(-1)
    found = [flat]
    if tensor.dim() == 2:
        found.append(tensor.detach().cpu().float().t().reshape(-1))
    if tensor.dtype in (torch.uint8, torch.int8):
        whole = tensor.detach().cpu().reshape(-1).view(torch.uint8)
        low, high = (whole & 15).to(torch.int8) - 8, (whole >> 4).to(torch.int8) - 8
        found += [torch.stack(pair, dim=1).reshape(-1).float() for pair in ((low, high), (high, low))]
        if tensor.dtype == torch.uint8:
            found.append(flat - 128)
    return found


def _pieces(flat: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    if len(flat) % size == 0:
        yield from flat.reshape(-1, size)


@dataclass(frozen=True)
class _Book:
    """Lines of one length of all secret matrices; `names[which[i]]` is the matrix of line i."""

    names: list[str]
    which: torch.Tensor
    units: torch.Tensor


def _books(matrices: Mapping[str, torch.Tensor]) -> dict[int, _Book]:
    """Return the lines that are looked for, by length: rows and columns of each matrix, and of each slice."""
    found: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in matrices.items():
        for matrix in tensor.detach().flatten(0, -3) if tensor.dim() > 2 else [tensor.detach()]:
            for lines in (matrix, matrix.t()):
                if len(lines) >= _LEAST_LINES and lines.shape[1] >= _LEAST_LENGTH:
                    found.setdefault(lines.shape[1], []).append((name, _centred(_spread(lines))))
    return {length: _book(groups) for length, groups in found.items()}


def _book(groups: list[tuple[str, torch.Tensor]]) -> _Book:
    sizes = torch.tensor([len(lines) for _, lines in groups])
    which = torch.repeat_interleave(torch.arange(len(groups)), sizes)
    return _Book([name for name, _ in groups], which, torch.cat([lines for _, lines in groups]))


def _spread(lines: torch.Tensor) -> torch.Tensor:
    return lines[torch.linspace(0, len(lines) - 1, min(len(lines), _MOST_LINES)).round().long().to(lines.device)]


def _by_lines(tensor: torch.Tensor, books: Mapping[int, _Book]) -> Iterator[tuple[str, str]]:
    for values in _values(tensor):
        for length, book in books.items():
            for lines in _laid_out(values, length):
                for group, count in _alike(book, lines):
                    total = int((book.which == group).sum())
                    yield book.names[group], f"near in {count} of {total} rows or columns that were looked for"


def _values(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a tensor's values as they are, and as the codes of 4 or 8 bits that integers may hold along either side."""
    whole = tensor.detach().cpu()
    yield whole.float()
    if whole.dtype not in (torch.uint8, torch.int8, torch.int32, torch.int64) or not whole.dim():
        return
    parts = whole.contiguous().view(torch.uint8).reshape(*whole.shape, -1)
    halves = torch.stack([parts & 15, parts >> 4], dim=-1).flatten(-2)
    for codes in (halves, parts) if parts.shape[-1] > 1 else (halves,):
        yield codes.flatten(-2).float()
        if whole.dim() > 1:
            yield codes.movedim(-1, 1).flatten(0, 1).float()


def _laid_out(values: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    """Yield a tensor's lines of a length: rows, also those of a matrix that is written as a vector, and columns."""
    if values.dim() == 1 and len(values) >= _LEAST_LINES * length:
        yield values[: len(values) // length * length].reshape(-1, length)
    elif values.shape[-1:] == (length,):
        yield values.reshape(-1, length)
    if values.dim() > 1 and values.shape[-2] == length:
        yield values.transpose(-1, -2).reshape(-1, length)


def _alike(book: _Book, lines: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Yield the secret matrices of which enough lines are near to as many of these, and how many."""
    best, times = torch.zeros(len(book.units)), torch.zeros(len(book.units), dtype=torch.long)
    place, step = torch.zeros_like(times), max(1, _CHUNK // len(book.units))
    for start in range(0, len(lines), step):
        near = (_centred(lines[start : start + step]) @ book.units.t()).abs()
        value, at = near.max(dim=0)
        place = torch.where(value > best, at + start, place)
        best, times = torch.maximum(best, value), times + (near >= NEAR).sum(dim=0)
    sure = (times > 0) & (times <= _FEW)
    counts = torch.bincount(book.which[sure], minlength=len(book.names))
    for group in (counts >= _LEAST_LINES).nonzero().flatten().tolist():
        count = len(set(place[sure & (book.which == group)].tolist()))
        if count >= _LEAST_LINES:
            yield group, count


def _vectors(secret: Mapping[str, torch.Tensor], allowed: Tensors) -> dict[str, torch.Tensor]:
    """Return the vectors that are looked for: none that is as good as constant, or as good as one that is allowed."""
    found = {n: t.detach().cpu().float() for n, t in secret.items() if t.dim() == 1 and len(t) >= _LEAST_VECTOR}
    others = [t.detach().cpu().float() for t in allowed.values() if t.dim() == 1]
    return {n: t for n, t in found.items() if not any(len(o) == len(t) and _rounded(o[None], t) for o in others)}


def _by_vector(tensor: torch.Tensor, vectors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    flat = tensor.detach().cpu().reshape(-1)
    for name, vector in vectors.items():
        pieces, rest = divmod(len(flat), len(vector))
        if not rest and 0 < pieces <= _MOST_VECTORS and _rounded(flat.float().reshape(-1, len(vector)), vector):
            yield name, "near, as rounded"


def _rounded(lines: torch.Tensor, vector: torch.Tensor) -> bool:
    """Return whether one of the lines is a vector but for rounding; nothing is like a constant."""
    close = torch.isclose(lines, vector, rtol=_BF16, atol=1e-30).all(dim=1)
    return bool((close & (_centred(lines) @ _centred(vector[None])[0] >= NEAR)).any())


def _centred(lines: torch.Tensor) -> torch.Tensor:
    """Return lines as units without their means: with codes, what stands for 0 falls out."""
    values = lines.cpu().float()
    away = values - values.mean(dim=1, keepdim=True)
    # What is left of a constant is rounding.
    away[away.norm(dim=1) <= 1e-6 * values.norm(dim=1)] = 0
    return torch.nn.functional.normalize(away, dim=1, eps=1e-30)


def _unit(tensor: torch.Tensor) -> torch.Tensor:
    return _normal(tensor.detach().cpu().float().reshape(-1))


def _normal(flat: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(flat, dim=0)


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().float().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()
