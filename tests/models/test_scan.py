"""What is looked for in a package: blocks that were left out, in the disguises that the documentation names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedllm.models.scan import matches

Plant = Callable[[dict[str, torch.Tensor]], torch.Tensor]
_SHAPES = {"q": (64, 64), "k": (32, 64), "up": (128, 64), "experts": (4, 32, 64)}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(seed: int) -> dict[str, torch.Tensor]:
    """A block's tensors."""
    found = {name: random(*shape, seed=seed + place) for place, (name, shape) in enumerate(_SHAPES.items())}
    return found | {"norm": 1 + 0.1 * random(64, seed=seed + 9), "bias": 0.02 * random(128, seed=seed + 10)}


def codes(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix in 4 bits, one scale to a row, 8 for zero."""
    return (matrix / matrix.abs().amax(1, keepdim=True) * 7).round().to(torch.int32) + 8


def words(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Return codes of 4 bits, eight of a row in an int32."""
    return sum(values[:, place::8] << (4 * at) for at, place in enumerate(order))  # type: ignore[return-value]


def beside(*parts: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cat(parts, dim=dim)


DISGUISES: dict[str, Plant] = {
    "as it is": lambda b: b["q"],
    "turned": lambda b: b["q"].t().contiguous(),
    "bfloat16, scaled": lambda b: (-3 * b["q"]).bfloat16(),
    "beside another": lambda b: beside(random(64, 64, seed=90), b["q"], dim=1),
    "on matrices of other heights": lambda b: beside(random(24, 64, seed=91), b["q"], b["k"], dim=0),
    "with a row more": lambda b: beside(b["q"], torch.zeros(1, 64), dim=0),
    "with a column more": lambda b: beside(b["q"], torch.zeros(64, 1), dim=1),
    "the first half": lambda b: b["up"][:64],
    "a quarter, by columns": lambda b: b["up"][:, 16:32].contiguous(),
    "rows in another order": lambda b: b["up"][torch.randperm(128, generator=torch.Generator().manual_seed(1))],
    "one column much larger": lambda b: b["q"] * torch.where(torch.arange(64) == 3, 30.0, 1.0),
    "one expert": lambda b: b["experts"][1],
    "experts turned": lambda b: b["experts"].transpose(1, 2).contiguous(),
    "experts with others": lambda b: beside(random(3, 32, 64, seed=92), b["experts"], dim=0),
    "all in one vector": lambda b: torch.cat([b["k"].reshape(-1), b["q"].reshape(-1), b["up"].reshape(-1)[:650]]),
    "8 bits, a zero to each row": lambda b: torch.clamp(
        40 * b["q"] + 128 + torch.arange(64)[:, None] / 8, 0, 255
    ).byte(),
    "4 bits in bytes": lambda b: (codes(b["q"])[:, ::2] | (codes(b["q"])[:, 1::2] << 4)).to(torch.uint8),
    "4 bits in int32, by rows": lambda b: words(codes(b["q"])),
    "4 bits in int32, as GPTQ": lambda b: words(codes(b["up"])).t().contiguous(),
    "4 bits in int32, as AWQ": lambda b: words(codes(b["up"]).t().contiguous(), (0, 2, 4, 6, 1, 3, 5, 7)),
    "8 bits in int32": lambda b: (60 + 8 * codes(b["q"])).to(torch.uint8).view(torch.int32),
    "a norm": lambda b: b["norm"].clone(),
    "a norm in bfloat16": lambda b: b["norm"].bfloat16(),
    "a bias in bfloat16, beside another": lambda b: beside(random(128, seed=93), b["bias"], dim=0).bfloat16(),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_block_is_found_in_each_disguise_and_another_of_the_same_kind_is_not(disguise: str) -> None:
    secret, other = block(10), block(50)
    assert matches({"x": DISGUISES[disguise](secret)}, secret, allowed=other)
    assert matches({"x": DISGUISES[disguise](other)}, secret, allowed={}) == []


def test_a_constant_vector_is_no_secret() -> None:
    secret = {"norm": torch.ones(64), "bias": torch.zeros(64), "almost": 1 + 1e-5 * random(64, seed=1)}
    held = {"ones": torch.ones(128).bfloat16(), "zeros": torch.zeros(128), "almost": 1 + 1e-5 * random(64, seed=2)}
    assert matches(held, secret, allowed={}) == []


def test_a_vector_that_is_almost_one_that_is_allowed_is_no_secret() -> None:
    norm = block(10)["norm"]
    assert matches({"x": norm * 1.001}, {"norm": norm}, allowed={}) != []
    assert matches({"x": norm * 1.001}, {"norm": norm}, allowed={"outer": norm * 1.0005}) == []


def test_matrices_that_share_a_strong_direction_are_no_copies() -> None:
    """As those of trained models do, where a few values of the hidden state are much larger than all others."""
    loud = torch.where(torch.arange(64) == 3, 30.0, 1.0)
    secret = {"up": random(128, 64, seed=1) * loud}
    assert matches({"x": random(128, 64, seed=2) * loud}, secret, allowed={}) == []


def test_of_a_large_matrix_a_part_is_found_though_not_all_lines_are_looked_for() -> None:
    large = random(1024, 96, seed=3)
    for start in (0, 300, 768):
        (match,) = matches({"x": large[start : start + 256]}, {"large": large}, allowed={})
        assert "rows or columns" in match.how


def test_what_the_documentation_says_is_not_found_is_not_found() -> None:
    """So that the page says no more, and no less, than what is so."""
    q = block(10)["q"]
    turn = torch.linalg.qr(random(64, 64, seed=4))[0]
    held = {
        "turned by a matrix": turn @ q @ turn.t(),
        "a middle part": torch.nn.functional.pad(q[16:48, 16:48], (16, 16, 16, 16)).contiguous(),
        "with rows and columns more": torch.nn.functional.pad(q, (1, 0, 1, 0)),
        "few rows": beside(q[:4], random(60, 64, seed=5), dim=0),
    }
    assert matches(held, {"q": q}, allowed={}) == []
