"""Codecs: shapes, means, errors, error feedback, and answers that are made to do harm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedllm.wire.codecs import Codec, CodecSettings
from fedllm.wire.payload import manifest_of

Tensors = dict[str, torch.Tensor]


def codec(**values: Any) -> Codec:
    return Codec(CodecSettings.model_validate(values))


ALL: list[dict[str, Any]] = [
    {"name": "fp32"},
    {"name": "bf16"},
    {"name": "int8"},
    {"name": "int8", "block_size": 256, "error_feedback": True},
    {"name": "int4"},
    {"name": "TopK", "density": 0.1},
    {"name": "TopK", "density": 0.01},
    {"name": "RandomK", "density": 0.25},
    {"name": "Grid", "limit": 8.0, "bits": 8},
    {"name": "Grid", "limit": 8.0, "bits": 16},
    {"name": "Grid", "limit": 8.0, "bits": 24},
]
SHAPES = [(7, 13), (1,), (0,), (), (64,), (65, 2)]


def update_of(seed: int = 0, *, scale: float = 0.01) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}": scale * torch.randn(shape, generator=generator) for i, shape in enumerate(SHAPES)}


def there_and_back(one: Codec, tensors: Tensors, *, party: str = "north", number: int = 1) -> Tensors:
    parts = one.encode(tensors, seed=1, party=party, number=number)
    return dict(one.decode(parts, manifest_of(tensors), seed=1, number=number))


@pytest.mark.parametrize("values", ALL, ids=str)
def test_what_travels_has_the_shapes_foretold_and_comes_back_in_the_old_ones(values: dict[str, Any]) -> None:
    one, tensors = codec(**values), update_of()
    parts = one.encode(tensors, seed=1, party="north", number=1)
    assert manifest_of(parts) == one.manifest(manifest_of(tensors))
    assert manifest_of(there_and_back(one, tensors)) == manifest_of(tensors)


@pytest.mark.parametrize("values", ALL, ids=str)
def test_the_same_update_has_the_same_bytes_and_is_left_as_it_was(values: dict[str, Any]) -> None:
    one, tensors = codec(**values), update_of()
    first, second = (one.encode(tensors, seed=1, party="north", number=1) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in update_of().items())


@pytest.mark.parametrize(
    ("values", "share"),
    [
        ({"name": "bf16"}, 0.5),
        ({"name": "int8"}, 0.2578125),
        ({"name": "int4"}, 0.1328125),
        ({"name": "TopK", "density": 0.1}, 0.1 + 1 / 32),
        ({"name": "TopK", "density": 0.01}, 0.02),
        ({"name": "RandomK", "density": 0.1}, 0.1),
        ({"name": "Grid", "limit": 1.0}, 0.5),
    ],
    ids=str,
)
def test_bytes_as_a_share_of_fp32(values: dict[str, Any], share: float) -> None:
    tensors = {"w": torch.zeros(3200, 64)}
    found = codec(**values).manifest(manifest_of(tensors))
    assert sum(spec.num_bytes for spec in found.values()) / (4 * 3200 * 64) == pytest.approx(share, rel=1e-3)


UNBIASED = [values for values in ALL if values["name"] not in ("fp32", "TopK") and not values.get("error_feedback")]


@pytest.mark.parametrize("values", UNBIASED, ids=str)
def test_the_mean_over_many_draws_is_the_value(values: dict[str, Any]) -> None:
    one, tensors, draws = codec(**values), {"w": update_of()["t0"]}, 400
    found = torch.stack([there_and_back(one, tensors, number=number)["w"] for number in range(draws)]).double()
    error = (found.mean(dim=0) - tensors["w"]).abs()
    standard = found.std(dim=0) / math.sqrt(draws)
    # Four standard errors. Near a step of the codec a draw that goes the other way is rare, and may not have come yet.
    assert (error <= 4 * standard.clamp_min(float(standard.max()) / 8) + 1e-9).all()


def test_rounding_to_the_nearest_is_biased_where_rounding_at_random_is_not() -> None:
    tensors = {"w": torch.cat([torch.tensor([1.0]), torch.full((63,), 0.3 / 127)])}
    nearest = codec(name="int8", error_feedback=True)
    assert there_and_back(nearest, tensors)["w"][1:].abs().max() == 0


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_error_is_at_most_a_step_of_the_block(name: str) -> None:
    tensors = {"w": update_of()["t5"]}
    rows = torch.nn.functional.pad(tensors["w"].reshape(-1), (0, -tensors["w"].numel() % 64)).reshape(-1, 64)
    step = rows.abs().amax(dim=1) / (127 if name == "int8" else 7) * 1.01
    error = (there_and_back(codec(name=name), tensors)["w"] - tensors["w"]).reshape(-1).abs()
    assert (error <= step.repeat_interleave(64)[: len(error)]).all()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-8, 1e4])
@pytest.mark.parametrize("name", ["int8", "int4", "bf16", "TopK"])
def test_tiny_and_huge_updates_stay_finite(name: str, scale: float) -> None:
    found = there_and_back(codec(name=name), update_of(scale=scale))
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert scale or not any(tensor.any() for tensor in found.values())


def test_top_k_keeps_the_largest_magnitudes() -> None:
    tensors = {"w": torch.tensor([0.1, -5.0, 0.2, 3.0, -0.3, 0.0, 0.4, 0.5, -0.6, 0.7])}
    found = there_and_back(codec(name="TopK", density=0.2), tensors)["w"]
    assert found.tolist() == [0, -5, 0, 3, 0, 0, 0, 0, 0, 0]


def test_random_k_chooses_the_same_places_at_all_parties_and_others_each_round() -> None:
    one, tensors = codec(name="RandomK", density=0.2), {"w": torch.ones(100)}
    places = [
        there_and_back(one, tensors, party=party, number=number)["w"].nonzero()[:, 0].tolist()
        for party, number in (("north", 1), ("east", 1), ("north", 2))
    ]
    assert places[0] == places[1] != places[2]


def test_values_on_the_grid_add_up_and_those_beyond_its_limit_are_cut_off() -> None:
    one = codec(name="Grid", limit=1.0, bits=16)
    tensors = {"w": torch.tensor([0.25, -2.0, 3.0])}
    parts = [one.encode(tensors, seed=1, party=party, number=1)["w#values"].long() for party in ("north", "east")]
    assert all(int(part[0]) == 0.25 * 2**15 for part in parts)
    assert [part[1:].tolist() for part in parts] == [[-32767, 32767]] * 2
    assert there_and_back(one, tensors)["w"][1:].tolist() == pytest.approx([-1.0, 1.0], abs=2**-15)


@pytest.mark.parametrize(("limit", "bits"), [(1.0, 8), (0.3, 16), (0.007, 12), (5.0, 24), (1e-6, 16)])
def test_steps_of_the_grid_are_powers_of_two_and_nothing_passes_the_limit(limit: float, bits: int) -> None:
    one = codec(name="Grid", limit=limit, bits=bits)
    found = there_and_back(one, {"w": torch.linspace(-2 * limit, 2 * limit, 999)})["w"].double()
    step = max(2.0 ** math.ceil(math.log2(limit) - bits + 1), 2.0**-30)
    assert torch.equal((found / step).round() * step, found)
    assert limit * (1 - 2.0 ** (2 - bits)) - 2.0**-30 <= float(found.abs().max()) <= limit


@pytest.mark.parametrize(
    "values",
    [{"name": "int4", "error_feedback": True}, {"name": "TopK", "density": 0.1, "error_feedback": True}],
    ids=str,
)
def test_error_feedback_sends_everything_in_the_end(values: dict[str, Any]) -> None:
    one = codec(**values)
    generator = torch.Generator().manual_seed(3)
    constant = torch.cat([torch.tensor([1.0]), 0.02 * torch.randn(99, generator=generator)])

    def error(rounds: int, *, feedback: bool) -> float:
        lost, sent = torch.zeros(100), torch.zeros(100)
        for number in range(rounds):
            whole = constant + lost if feedback else constant
            arrived = there_and_back(one, {"w": whole}, number=number)["w"]
            lost, sent = whole - arrived, sent + arrived
        return float((sent / rounds - constant).norm() / constant.norm())

    assert error(300, feedback=True) < 0.05 * error(10, feedback=False)
    # Without it, what is lost is lost in every round.
    assert error(300, feedback=False) > 0.9 * error(10, feedback=False)


def test_parts_that_no_encoder_makes_do_no_harm() -> None:
    tensors = {"w": torch.ones(64)}
    manifest = manifest_of(tensors)
    sparse, dense = codec(name="TopK", density=0.02), codec(name="TopK", density=0.5)
    bad = {"w#values": torch.ones(1), "w#positions": torch.tensor([2**31 - 1], dtype=torch.int32)}
    assert sparse.decode(bad, manifest, seed=1, number=1)["w"].sum() == 1
    for bits in (0, 255):
        parts = {"w#values": torch.ones(32), "w#bitmap": torch.full((8,), bits, dtype=torch.uint8)}
        assert dense.decode(parts, manifest, seed=1, number=1)["w"].sum() <= 32
    # What overflows is found by whoever sums: it is infinite, not a wrong finite number.
    scales = {
        "w#values": torch.full((64,), 127, dtype=torch.int8),
        "w#scales": torch.tensor([3e38], dtype=torch.bfloat16),
    }
    assert torch.isinf(codec(name="int8").decode(scales, manifest, seed=1, number=1)["w"]).all()


@pytest.mark.parametrize(
    "values",
    [
        {"name": "zip"},
        {"name": "Grid"},
        {"name": "int8", "density": 0.5},
        {"name": "TopK", "density": 0.0},
        {"name": "int8", "block_size": 1},
        {"name": "fp32", "error_feedback": True},
        {"name": "Grid", "limit": 1.0, "bits": 32},
        {"block_size": 64},
    ],
)
def test_settings_without_effect_or_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CodecSettings.model_validate(values)
