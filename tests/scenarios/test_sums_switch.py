"""Secure aggregation is a switch of the job: the same bits as without it, in every rule that needs only a sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rounds import check_the_plan
from tiny import TinyFederation, mostly_thorough

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


@pytest.mark.parametrize(
    "case",
    mostly_thorough(
        CASES, "fp32", "Grid", "Grid, 8 bits, error feedback", "some parties", "SCAFFOLD", "FedSA-LoRA", "IA3"
    ),
)
def test_a_run_has_the_same_bits_with_secure_sums_and_without(case: str, make_federation: Make) -> None:
    found = {}
    for name, changes in {"plain": {}, "secure": SECURE}.items():
        result = make_federation(name, sizes=SIZES, job=PLAN | CASES[case] | changes).run()
        rows = [row for row in result.rows() if not row["name"].startswith(("seconds", "bytes"))]
        found[name] = result.status, result.adapter_sha256, rows
    assert found["plain"] == found["secure"]


def test_noise_in_training_and_secure_sums_go_together(make_federation: Make) -> None:
    noise = {"privacy.differential_privacy": {"unit": "example", "noise_multiplier": 1.0, "accountant": "RDP"}}
    found = {}
    for name, changes in {"plain": {}, "secure": SECURE}.items():
        result = make_federation(name, sizes=SIZES, job=PLAN | GRID | noise | changes).run()
        spent = [row for row in result.rows() if row["name"] == "epsilon_spent"]
        found[name] = [(row["round"], row["party"], round(row["value"], 6)) for row in spent]
    # What each party spent is no secret, and a secure sum carries it all the same.
    assert found["plain"] == found["secure"] and len(found["plain"]) == 12


def test_the_plan_foretells_the_bytes_of_secure_sums(make_federation: Make) -> None:
    check_the_plan(make_federation(sizes=SIZES, job=PLAN | GRID | SECURE))


def test_the_plan_says_what_the_server_sees(make_federation: Make) -> None:
    for changes, words in (({}, "each party's update"), (SECURE, "weighted sum of the parties' updates")):
        job = make_federation(str(len(words)), sizes=SIZES, job=changes).job()
        assert words in job.table_line().who_learns_what(job.federation, job.privacy)[0]
    # Who needs how many accomplices follows from the threshold.
    for threshold, said in ((None, "more than a third"), (4, "unless 4 parties")):
        secure = {"privacy.secure_aggregation": {"enabled": True, "threshold": threshold}}
        job = make_federation(f"{threshold}", sizes=SIZES, job=secure).job()
        assert said in job.table_line().who_learns_what(job.federation, job.privacy)[0]
