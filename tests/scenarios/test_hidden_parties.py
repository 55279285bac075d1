"""Whole parties are hidden: by a server that is trusted with the sum, or by the parties themselves in a secure sum."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rounds import adapters, check_the_plan
from tiny import TinyFederation

from fedllm.errors import FedllmError, RunFailed, RunPaused
from fedllm.job.check import check_job
from fedllm.privacy.accountant import Mechanism, epsilon_of
from fedllm.runtime.noise import noise_at
from fedllm.runtime.run import RunResult, Watch, resume
from fedllm.wire.codecs import Codec, CodecSettings
from fedllm.wire.payload import manifest_of

Make = Callable[..., TinyFederation]
SIZES = {"north": 6, "east": 9, "south": 4, "west": 5}
PLAN: dict[str, Any] = {
    "federation.num_rounds": 3,
    "federation.keep": "last",
    "federation.weight_by": "equal",
    "federation.drift_meter": False,
}
NOISE = {"unit": "party", "noise_multiplier": 2.0, "clip_norm": 0.5}
CENTRAL = PLAN | {"privacy.differential_privacy": NOISE}
SHARED = PLAN | {
    "federation.codec": {"name": "Grid", "limit": 16.0},
    "privacy.secure_aggregation": {"enabled": True},
    "privacy.differential_privacy": NOISE | {"placement": "distributed"},
}
WAYS = {"central": CENTRAL, "central, adaptive": CENTRAL, "distributed": SHARED}
WAYS["central, adaptive"] = PLAN | {
    "federation.min_parties": 4,
    "privacy.differential_privacy": {"unit": "party", "noise_multiplier": 0.2, "adaptive_clip": True},
}


def moved(result: RunResult) -> torch.Tensor:
    """Return by how much the last round moved the adapter."""
    found = adapters(result)
    last, before = found[max(found)], found[max(found) - 1]
    return torch.cat([(last[name] - before[name]).double().flatten() for name in last])


@pytest.mark.parametrize("way", ["central", "distributed"])
def test_the_mean_has_the_noise_that_the_job_asks_for(way: str, make_federation: Make) -> None:
    changes = moved(make_federation(sizes=SIZES, job=WAYS[way]).run())
    # Deviation 2 x 0.5 on the sum of four. A share is enough if one of four is missing, so with all there is more.
    expected = 2.0 * 0.5 / 4 * (1 if way == "central" else (4 / 3) ** 0.5)
    assert float(changes.std()) == pytest.approx(expected, rel=0.25)
    plain = PLAN | {"federation.codec": SHARED["federation.codec"]}
    assert float(moved(make_federation("plain", sizes=SIZES, job=plain).run()).std()) < expected / 3


def test_noise_of_the_server_counts_what_the_grid_adds_to_an_update(make_federation: Make) -> None:
    """Of many small values rounding to a coarse grid makes an update much longer than it was clipped to."""
    codec = CodecSettings.model_validate({"name": "Grid", "bits": 6, "limit": 1.0})
    result = make_federation(sizes=SIZES, job=CENTRAL | {"federation.codec": codec.model_dump(exclude_none=True)}).run()
    changes, step = moved(result), Codec(codec).step
    update = {"a": torch.full((len(changes),), 0.5 / len(changes) ** 0.5)}
    coded = Codec(codec).encode(update, seed=1, party="north", number=1)
    arrived = Codec(codec).decode(coded, manifest_of(update), seed=1, number=1)
    longest = 0.5 + step * len(changes) ** 0.5
    assert 0.5 * 1.1 < float(arrived["a"].norm()) <= longest
    # The rounding of four parties is in it as well, which is no part of the noise.
    assert float(changes.std()) == pytest.approx(2.0 * longest / 4, rel=0.25)


def test_with_colluders_the_noise_of_the_others_is_enough(make_federation: Make) -> None:
    job = SHARED | {"privacy.differential_privacy": NOISE | {"placement": "distributed", "colluders": 1}}
    changes = moved(make_federation(sizes=SIZES, job=job).run())
    # Three may be what stays, and two of them honest; all four add theirs.
    assert float(changes.std()) == pytest.approx(2.0 * 0.5 / 4 * (4 / 2) ** 0.5, rel=0.25)


@pytest.mark.parametrize("way", WAYS)
def test_epsilon_is_told_and_right(way: str, make_federation: Make) -> None:
    federation = make_federation(sizes=SIZES, job=WAYS[way])
    result = federation.run()
    spent = [row["value"] for row in result.rows() if row["name"] == "epsilon_spent" and row["party"] is None]
    noise = WAYS[way]["privacy.differential_privacy"]["noise_multiplier"]
    expected = [epsilon_of([Mechanism(1.0, noise, n)], delta=1e-5, accountant="RDP") for n in (1, 2, 3)]
    assert spent == pytest.approx(expected)
    assert f"epsilon {expected[-1]:.3f} per party" in (result.path / "adapter" / "README.md").read_text()
    foreseen = noise_at(federation.job(), "north", examples=6, groups=1, size=10**6)
    assert foreseen is not None and foreseen.epsilon == pytest.approx(expected[-1])
    assert "nothing will be learned" in foreseen.text


@pytest.mark.parametrize("way", WAYS)
def test_a_round_that_is_repeated_has_the_same_bits_and_one_charge(way: str, make_federation: Make) -> None:
    federation = make_federation(sizes=SIZES, job=WAYS[way])

    def stop(number: int, rows: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.run(watch=Watch(on_round=stop))
    first = {path: path.read_bytes() for path in federation.folder.rglob("privacy/*.jsonl")}
    result = resume(federation.folder / "run")
    assert result.status == "SUCCESS"
    for path, before in first.items():
        after = path.read_bytes()
        assert after.startswith(before)
        rounds = [json.loads(line)["round"] for line in after.decode().splitlines()]
        assert rounds == [1, 2, 3]
    assert len(first) == (4 if way == "distributed" else 1)


def test_only_the_sum_of_shares_is_enough_noise(make_federation: Make) -> None:
    # Each party's share is smaller than what hides it: without the secure sum, the job is refused.
    federation = make_federation(sizes=SIZES, job=SHARED | {"privacy.secure_aggregation": None})
    with pytest.raises(FedllmError, match="E09"):
        check_job(federation.job(), federation.parties())


def test_the_clip_norm_follows_the_updates(make_federation: Make) -> None:
    job = WAYS["central, adaptive"] | {"federation.num_rounds": 6, "train.learning_rate": 0.05}
    result = make_federation(sizes=SIZES, job=job).run()
    norms = [row["value"] for row in result.rows() if row["name"] == "clip_norm"]
    assert norms[0] == 0.1 and len(norms) == 6 and len(set(norms)) > 1


def test_what_would_tell_of_a_party_is_not_sent(make_federation: Make) -> None:
    result = make_federation(sizes=SIZES, job=CENTRAL).run()
    told = {row["name"] for row in result.rows() if row["party"] is None and row["value"] is not None}
    assert "loss_nats" not in told and "tokens" not in told
    assert {"epsilon_spent", "clip_norm", "steps"} <= told


def test_a_run_stops_before_the_round_that_would_pass_its_epsilon(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedllm.scenarios import fedhomollm_party_unit

    federation = make_federation(
        sizes=SIZES, job=PLAN | {"privacy.differential_privacy": {"unit": "party", "epsilon": 6.0}}
    )
    monkeypatch.setattr(
        fedhomollm_party_unit, "run_of", lambda settings, asked: Mechanism(1.0, 1.0, settings.num_rounds)
    )
    with pytest.raises((RunPaused, RunFailed, FedllmError)) as caught:
        federation.run()
    assert caught.value.code == "BUDGET_EXHAUSTED"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"federation.weight_by": "examples"}, "E05"),
    "best": ({"federation.keep": "best"}, "held-out losses"),
    "drift": ({"federation.drift_meter": True}, "E06"),
    "codec": ({"federation.codec": {"name": "int8"}}, "E06"),
    "SCAFFOLD": ({"federation.strategy": {"name": "SCAFFOLD"}, "train.optim": "sgd"}, "E06"),
    "FedSA-LoRA": ({"federation.lora_rule": "FedSA-LoRA"}, "E06"),
    "nobody's noise left": (
        {
            "privacy.differential_privacy": NOISE | {"placement": "distributed", "colluders": 3},
            "privacy.secure_aggregation": {"enabled": True},
        },
        "nobody's noise would be left (E09)",
    ),
    "shares in fp32": (
        {
            "privacy.differential_privacy": NOISE | {"placement": "distributed"},
            "privacy.secure_aggregation": {"enabled": True},
        },
        "E09",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_hide_a_party_is_refused(case: str, make_federation: Make) -> None:
    changes, reason = REFUSED[case]
    federation = make_federation(sizes=SIZES, job=CENTRAL | changes)
    with pytest.raises(FedllmError) as caught:
        check_job(federation.job(), federation.parties())
    assert any(reason in error.what for error in (caught.value, *caught.value.also))
    open_ = make_federation("open", sizes=SIZES, job=PLAN | changes | {"privacy.differential_privacy": None})
    if "privacy.differential_privacy" not in changes:
        check_job(open_.job(), open_.parties())


@pytest.mark.parametrize(
    ("noise", "codec", "words"),
    [
        ({}, {"name": "Grid", "limit": 0.5}, "set `federation.codec.limit: 8`"),
        ({"noise_multiplier": 0.001, "clip_norm": 0.01}, {"name": "Grid", "limit": 16.0, "bits": 8}, "codec.bits"),
    ],
)
def test_a_grid_that_does_not_hold_the_noise_is_found_at_the_start(
    noise: dict[str, Any], codec: dict[str, Any], words: str, make_federation: Make, caplog: pytest.LogCaptureFixture
) -> None:
    asked = SHARED["privacy.differential_privacy"] | noise
    changes = SHARED | {"federation.codec": codec, "privacy.differential_privacy": asked}
    with pytest.raises(RunFailed) as caught:
        make_federation(sizes=SIZES, job=changes).run()
    assert caught.value.code == "SUM_OVERFLOW"
    assert words in caplog.text


def test_the_plan_foretells_the_bytes(make_federation: Make) -> None:
    check_the_plan(make_federation(sizes=SIZES, job=SHARED))


def test_a_clip_norm_that_few_parties_cannot_adapt_is_refused(make_federation: Make) -> None:
    asked = {"unit": "party", "noise_multiplier": 1.0, "adaptive_clip": True}
    with pytest.raises(FedllmError, match="adaptive_clip"):
        make_federation(sizes=SIZES, job=PLAN | {"privacy.differential_privacy": asked}).run()
