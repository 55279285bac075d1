"""Secure aggregation is a switch of the job: the same bits as without it, in every rule that needs only a sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rounds import broken_and_resumed, check_the_plan
from tiny import TinyFederation

from fedllm.errors import ConfigError

Make = Callable[..., TinyFederation]
SECURE = {"privacy.secure_aggregation": {"enabled": True}}
GRID = {"federation.codec": {"name": "Grid", "limit": 0.5}}
SIZES = {"north": 6, "east": 9, "south": 4, "west": 5}
PLAN: dict[str, Any] = {"federation.num_rounds": 3}
SGD: dict[str, Any] = {"train.optim": "sgd", "train.learning_rate": 0.5, "train.lr_scheduler_type": "constant"}

CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "Grid": GRID,
    "Grid, equal weights": GRID | {"federation.weight_by": "equal"},
    "Grid, 8 bits, error feedback": {
        "federation.codec": {"name": "Grid", "limit": 0.5, "bits": 8, "error_feedback": True}
    },
    "Grid, 20 bits": {"federation.codec": {"name": "Grid", "limit": 0.5, "bits": 20}},
    "some parties": {"federation.fraction_train": 0.75},
    "SCAFFOLD": SGD | {"federation.strategy": {"name": "SCAFFOLD"}},
    "FedAdam, RoLoRA": GRID | {"federation.strategy": {"name": "FedAdam"}, "federation.lora_rule": "RoLoRA"},
    "FedSA-LoRA": {"federation.lora_rule": "FedSA-LoRA"},
    "IA3": {"peft": {"peft_type": "IA3"}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_has_the_same_bits_with_secure_sums_and_without(case: str, make_federation: Make) -> None:
    found = {}
    for name, changes in {"plain": {}, "secure": SECURE}.items():
        result = make_federation(name, sizes=SIZES, job=PLAN | CASES[case] | changes).run()
        rows = [row for row in result.rows() if not row["name"].startswith(("seconds", "bytes"))]
        found[name] = result.status, result.adapter_sha256, rows
    assert found["plain"] == found["secure"]
