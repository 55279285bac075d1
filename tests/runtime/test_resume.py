"""A run that crashes anywhere and goes on ends with the same bits, and counts no round twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crashes import Crash, Disk, committed_once, go_on, lasting, share_the_base, some
from tiny import TinyFederation

from fedllm.runtime.run import resume

Make = Callable[..., TinyFederation]
SIZES = {"north": 5, "south": 4, "east": 3}
PLANS: dict[str, dict[str, Any]] = {
    "keep, momentum, a share of the parties": {
        "federation.fraction_train": 0.6,
        "federation.strategy": {"name": "FedAvgM", "server_momentum": 0.6},
        "peft.lora_dropout": 0.2,
    },
    "reset": {"train.optimizer_state": "reset", "federation.eval_every": 2},
}
PLAN = {"federation.num_rounds": 3, "train.local_steps": 1}


def whole(path: Path) -> bool:
    names = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/README.md", "report.html")
    return all((path / name).exists() for name in names)


@pytest.mark.parametrize("name", PLANS)
def test_a_crash_at_any_touch_of_the_disk_changes_nothing(
    name: str, make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN | PLANS[name])
    share_the_base(monkeypatch, federation)
    disk = Disk(monkeypatch)
    expected = federation.run("unbroken")
    points = disk.count
    assert points > 80
    for point in some(range(1, points + 1), every=9 + 8 * list(PLANS).index(name)):
        folder = f"crash{point}"
        with pytest.raises(Crash), disk.crashing_at(point):
            federation.run(folder)
        result = go_on(federation, folder)
        assert (result.status, result.adapter_sha256) == ("SUCCESS", expected.adapter_sha256), point
        committed_once(result.path, 3)
        assert lasting(result.rows()) == lasting(expected.rows()), point
        assert whole(result.path), point
        assert not list(result.path.rglob("*.tmp")) or point < 20


def test_a_party_s_own_factor_survives_a_crash_at_any_touch_of_the_disk(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(path: Path) -> dict[str, bytes]:
        return {file.parts[-3]: file.read_bytes() for file in path.glob("parties/*/adapter/adapter_model.safetensors")}

    plan = PLAN | {"federation.lora_rule": "FedSA-LoRA"}
    federation = make_federation(sizes={"north": 5, "south": 4}, job=plan)
    share_the_base(monkeypatch, federation)
    disk = Disk(monkeypatch)
    expected = federation.run("unbroken")
    # The end, where the adapters are handed over, more closely than the rest.
    end = range(disk.count - 25, disk.count)
    for point in sorted({*some(range(1, disk.count), every=24), *some(end, every=3)}):
        folder = f"crash{point}"
        with pytest.raises(Crash), disk.crashing_at(point):
            federation.run(folder)
        result = go_on(federation, folder)
        assert own(result.path) == own(expected.path) and len(own(result.path)) == 2, point
        committed_once(result.path, 3)


def test_a_run_that_crashes_at_every_point_in_turn_still_arrives(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(sizes={"north": 4, "south": 3}, job=PLAN)
    share_the_base(monkeypatch, federation)
    disk = Disk(monkeypatch)
    expected = federation.run("unbroken")
    crashes = 0
    for budget in range(25, 400, 3):
        try:
            with disk.crashing_at(budget):
                result = go_on(federation, "broken")
            break
        except Crash:
            crashes += 1
    assert crashes >= 3
    assert result.adapter_sha256 == expected.adapter_sha256
    committed_once(result.path, 3)
    assert lasting(result.rows()) == lasting(expected.rows())


def test_resuming_a_finished_run_changes_nothing(make_federation: Make) -> None:
    federation = make_federation(job=PLAN)
    result = federation.run()
    before = {path: path.read_bytes() for path in result.path.rglob("*") if path.is_file()}
    assert resume(result.path) == result
    assert {path: path.read_bytes() for path in result.path.rglob("*") if path.is_file()} == before
