"""The plan of a job that is claimed, or whose copies are traced, foretells the bytes of the log and of the copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rounds import SENT, check_the_plan
from tiny import TinyFederation, mostly_thorough

from fedllm.runtime.ownership import commit
from fedllm.runtime.plan import rehearse
from fedllm.runtime.validate import validate

Make = Callable[..., TinyFederation]
PLAN: dict[str, Any] = {
    "federation.num_rounds": 7,
    "federation.keep": "last",
    "peft.target_modules": "all-linear",
    "train.local_steps": 2,
}
CLAIMS = {"ownership.carrier": "product", "ownership.claimants": ["north", "east"]}
TRACED = {"ownership.trace": "delivered"}
GROWS = {"federation.lora_rule": "FedEx-LoRA"}


CASES = {"claims": CLAIMS, "copies": TRACED, "both": CLAIMS | TRACED, "copies that grow": TRACED | GROWS}


@pytest.mark.parametrize("case", mostly_thorough(CASES, "both", "copies that grow"))
def test_the_plan_foretells_the_log_and_the_copies(case: str, make_federation: Make) -> None:
    federation = make_federation(job=PLAN | CASES[case])
    if "ownership.claimants" in CASES[case]:
        commit(federation.job(), federation.parties())
    check_the_plan(federation)


def test_they_are_a_part_of_what_is_sent(make_federation: Make) -> None:
    totals, ups = [], []
    for name, more in {"plain": {}, "claims": CLAIMS, "both": CLAIMS | TRACED}.items():
        federation = make_federation(name, job=PLAN | more)
        found = rehearse(federation.job(), validate(federation.job(), federation.parties()))
        totals.append(found.total)
        ups.append(found.most_up["south"])
    # Else the plan would be within its bound without them.
    assert totals[1] > 1.03 * totals[0] and totals[2] > 1.03 * totals[1]
    assert ups[0].per_round < ups[1].per_round < ups[2].per_round


def test_what_follows_a_round_is_counted_in_rows_of_its_own(make_federation: Make) -> None:
    federation = make_federation(job=PLAN | CLAIMS | TRACED)
    commit(federation.job(), federation.parties())
    rows = federation.run().rows()
    after = {(row["round"], row["name"]) for row in rows if row["name"] in SENT and "after" in row["name"]}
    assert after == {(number, f"bytes_after_{way}") for number in range(8) for way in ("up", "down")}
    down = {row["round"]: row["value"] for row in rows if row["name"] == "bytes_after_down" and row["party"] == "east"}
    assert down[7] > 2 * down[6]
