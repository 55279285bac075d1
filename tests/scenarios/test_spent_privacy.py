"""What a job may say does not give it a fresh budget, and a unit is not paid for with a smaller one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tiny import TinyFederation, records, write_jsonl

from fedllm.errors import BudgetExhausted, ExitCode
from fedllm.privacy.accountant import epsilon_of
from fedllm.privacy.ledger import Charge, Ledger
from fedllm.runs.jsonl import read_rows
from fedllm.runtime.plan import make_plan
from fedllm.runtime.validate import validate

Make = Callable[..., TinyFederation]
SIZES = {"north": 20, "south": 20}
NOISE: dict[str, Any] = {"unit": "example", "epsilon": 4.0, "accountant": "RDP"}
SITE: dict[str, Any] = {"limits": {"max_epsilon": 4.1}, "data.eval": None, "data.eval_share": 0.1}
PLAN: dict[str, Any] = {
    "federation.num_rounds": 2,
    "federation.keep": "last",
    "federation.eval_every": 0,
    "privacy.differential_privacy": NOISE,
}


def charges(federation: TinyFederation, party: str = "north") -> list[Charge]:
    return Ledger(federation.folder / "parties" / "privacy" / f"{party}.jsonl").charges()


def refused(federation: TinyFederation, name: str) -> BudgetExhausted:
    with pytest.raises(BudgetExhausted) as caught:
        federation.run(name)
    assert caught.value.exit_code == ExitCode.BUDGET
    return caught.value


def test_no_setting_of_a_job_gives_it_a_fresh_budget(make_federation: Make) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN, party=SITE)
    federation.run("first")
    changes: dict[str, dict[str, Any]] = {
        "again": {},
        "seed": {"seed": 8},
        "length": {"data.max_length": 24},
        "loss": {"data.completion_only_loss": False},
    }
    for name, change in changes.items():
        job = PLAN | {"federation.num_rounds": 4} | change
        assert refused(make_federation(sizes=SIZES, job=job, party=SITE), name).code == "BUDGET_EXHAUSTED", name
    for party in SIZES:
        paid = charges(federation, party)
        assert len({charge.data for charge in paid}) == 1
        assert 3.9 < epsilon_of([charge.mechanism for charge in paid], delta=1e-5, accountant="RDP") <= 4.1


def test_the_same_rows_in_another_order_are_spent_and_other_rows_are_not(make_federation: Make) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN, party=SITE)
    federation.run("first")
    files = {party: federation.folder / "data" / f"{party}.jsonl" for party in SIZES}
    for file in files.values():
        write_jsonl(file, read_rows(file)[::-1])
    assert refused(federation, "turned").code == "BUDGET_EXHAUSTED"
    # One changed row is other data, as the documentation says: who has the rows is not whom the ledger guards against.
    for party, file in files.items():
        write_jsonl(file, [*read_rows(file)[1:], *records(f"new {party}", 1)])
    assert federation.run("other").status == "SUCCESS"


def test_persons_are_not_hidden_after_their_examples_were(make_federation: Make) -> None:
    def federation(**noise: Any) -> TinyFederation:
        group = {"data.group_by": "who"} if noise["unit"] == "group" else {}
        found = make_federation(
            sizes=SIZES, job=PLAN | {"privacy.differential_privacy": NOISE | noise} | group, party=SITE
        )
        for party in SIZES:
            file = found.folder / "data" / f"{party}.jsonl"
            write_jsonl(file, [row | {"who": f"person {n % 10}"} for n, row in enumerate(read_rows(file))])
        return found

    federation(unit="group", epsilon=2.0).run("persons")
    examples = federation(unit="example", epsilon=2.0)
    examples.run("examples")
    paid = charges(examples)
    assert [(charge.unit, charge.group_by) for charge in paid] == [("group", "who")] * 2 + [("example", "")] * 2
    assert len({charge.data for charge in paid}) == 1
    # The examples' run counted what was spent on persons, so a third one finds too little left.
    assert refused(federation(unit="example", epsilon=4.0), "more").code == "BUDGET_EXHAUSTED"
    paid = charges(examples)
    persons = federation(unit="group", epsilon=1.0)
    assert refused(persons, "late").code == "BUDGET_OTHER_UNIT"
    assert charges(persons) == paid
    with pytest.raises(BudgetExhausted, match="BUDGET_OTHER_UNIT"):
        make_plan(persons.job(), persons.parties(), validate(persons.job(), persons.parties()))
