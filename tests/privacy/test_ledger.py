"""The ledger and the budget: paid before drawn, once per release, over all runs, and noticed when tampered with."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedllm.data.tokens import TokenisedExample
from fedllm.errors import BudgetExhausted, ExitCode, StateLost
from fedllm.privacy.accountant import Mechanism, epsilon_of
from fedllm.privacy.budget import Budget, Purse
from fedllm.privacy.ledger import Charge, Ledger, data_digest, spent_on
from fedllm.privacy.terms import Terms

ROUND = Mechanism(0.1, 1.0, 5)
TERMS = Terms("example", "d" * 64, ROUND, 1e-5, "RDP", None)


def charge(**changes: Any) -> Charge:
    values = {"data": "d", "unit": "example", "run": "r", "round": 1, "inputs": "i", "noise": "k"}
    return Charge(**values | {"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 5} | changes)


def spent(steps: int) -> float:
    return epsilon_of([replace(ROUND, steps=steps)], delta=1e-5, accountant="RDP")


def budget(folder: Path, run: str = "run1", *, most: float | None = None, **options: Any) -> Budget:
    return Budget(Purse(folder / "privacy", most), party="north", run_id=run, folder=folder / run, **options)


def ledger(folder: Path) -> Ledger:
    return Ledger(folder / "privacy" / "north.jsonl")


def test_charges_come_back_in_order_and_each_once(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "north.jsonl")
    assert book.charges() == [] and book.head() == ""
    first, second = charge(), charge(round=2)
    book.add(first)
    head = book.add(second)
    assert book.add(first) == head
    assert Ledger(book.path).charges() == [first, second]
    assert spent_on(book.charges(), "d") == [first.mechanism, second.mechanism]
    assert spent_on(book.charges(), "other") == []


@pytest.mark.parametrize("line", [0, 1])
@pytest.mark.parametrize("change", [{"steps": 1}, {"noise_multiplier": 99.0}, {"data": "x"}, {"hash": "0" * 64}, None])
def test_a_changed_or_missing_line_is_noticed(tmp_path: Path, line: int, change: dict[str, Any] | None) -> None:
    book = Ledger(tmp_path / "north.jsonl")
    for number in (1, 2):
        book.add(charge(round=number))
    lines = book.path.read_text().splitlines()
    if change is None:
        del lines[line]
    else:
        lines[line] = json.dumps(json.loads(lines[line]) | change)
    book.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(StateLost) as caught:
        book.charges()
    assert (caught.value.code, caught.value.exit_code) == ("LEDGER_BROKEN", ExitCode.STATE_LOST)
    with pytest.raises(StateLost):
        book.add(charge(round=3))


def test_a_deleted_or_older_ledger_is_noticed_by_its_head(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "north.jsonl")
    book.add(charge())
    old = book.path.read_bytes()
    book.add(charge(round=2))
    book.path.write_bytes(old)
    with pytest.raises(StateLost, match="LEDGER_BROKEN"):
        book.charges()
    book.path.unlink()
    with pytest.raises(StateLost, match="LEDGER_BROKEN"):
        book.charges()


def test_a_ledger_rolled_back_with_its_head_is_noticed_by_the_run(tmp_path: Path) -> None:
    own = budget(tmp_path)
    own.open_round(1, "i", TERMS)
    shutil.copytree(tmp_path / "privacy", tmp_path / "backup")
    own.open_round(2, "i", TERMS)
    shutil.rmtree(tmp_path / "privacy")
    shutil.copytree(tmp_path / "backup", tmp_path / "privacy")
    for act in (lambda: own.open_round(3, "i", TERMS), lambda: budget(tmp_path), lambda: own.spent(TERMS)):
        with pytest.raises(StateLost, match="LEDGER_BROKEN"):
            act()
    # What cannot be noticed: another run has nothing to compare with. The documentation says so.
    budget(tmp_path, "run2").open_round(1, "i", TERMS)


def test_a_run_that_has_trained_without_a_charge_is_refused(tmp_path: Path) -> None:
    budget(tmp_path, trained=[0]).open_round(1, "i", TERMS)
    budget(tmp_path, trained=[1])
    with pytest.raises(StateLost, match="round 2"):
        budget(tmp_path, trained=[2, 1])
    # The whole folder gone, and the run's own note with it.
    shutil.rmtree(tmp_path / "privacy")
    (tmp_path / "run1" / "ledger.json").unlink()
    with pytest.raises(StateLost, match="round 1"):
        budget(tmp_path, trained=[1])


def test_the_same_round_is_paid_once_and_has_the_same_noise(tmp_path: Path) -> None:
    first = budget(tmp_path).open_round(1, "i", TERMS).normals(5)
    assert (budget(tmp_path).open_round(1, "i", TERMS).normals(5) == first).all()
    assert len(ledger(tmp_path).charges()) == 1


def test_a_round_from_other_inputs_is_another_release(tmp_path: Path) -> None:
    """With the noise of the first one, the difference of the two would show the data bare."""
    own = budget(tmp_path)
    first = own.open_round(1, "i", TERMS).normals(5)
    assert (own.open_round(1, "j", TERMS).normals(5) != first).all()
    assert len(ledger(tmp_path).charges()) == 2
    assert own.spent(TERMS) == spent(10)


def test_the_epsilon_of_a_run_ends_it_before_the_round_that_would_pass_it(tmp_path: Path) -> None:
    terms, own = replace(TERMS, epsilon=spent(10)), budget(tmp_path)
    own.open_round(1, "i", terms)
    own.open_round(2, "i", terms)
    before = (tmp_path / "privacy" / "north.jsonl").read_bytes()
    with pytest.raises(BudgetExhausted) as caught:
        own.open_round(3, "i", terms)
    assert (caught.value.code, caught.value.exit_code) == ("BUDGET_EXHAUSTED", ExitCode.BUDGET)
    assert (tmp_path / "privacy" / "north.jsonl").read_bytes() == before
    # What was paid for may be done again.
    own.open_round(2, "i", terms)


def test_a_site_s_limit_is_for_all_runs_on_the_same_data(tmp_path: Path) -> None:
    most = spent(10)
    budget(tmp_path, "run1", most=most).open_round(1, "i", TERMS)
    second = budget(tmp_path, "run2", most=most)
    second.open_round(1, "i", TERMS)
    assert (second.spent(TERMS), second.spent_by_all(TERMS)) == (spent(5), most)
    with pytest.raises(BudgetExhausted, match="max_epsilon"):
        second.open_round(2, "i", TERMS)
    second.open_round(2, "i", replace(TERMS, data="e" * 64))


def test_two_runs_at_once_lose_no_charge(tmp_path: Path) -> None:
    children = []
    for name in ("run1", "run2", "run3"):
        child = os.fork()
        if child == 0:
            own = budget(tmp_path, name)
            for number in range(1, 6):
                own.open_round(number, "i", TERMS)
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert len(ledger(tmp_path).charges()) == 15


def test_a_site_s_limit_holds_when_runs_ask_at_once(tmp_path: Path) -> None:
    children = []
    for name in ("run1", "run2", "run3"):
        child = os.fork()
        if child == 0:
            with suppress(BudgetExhausted):
                for number in range(1, 6):
                    budget(tmp_path, name, most=spent(35)).open_round(number, "i", TERMS)
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert len(ledger(tmp_path).charges()) == 7


def test_the_digest_of_data_does_not_depend_on_their_order() -> None:
    rows = [TokenisedExample((1, 2, n), (False, True, True), False, 1) for n in range(4)]
    assert data_digest(rows) == data_digest(rows[::-1])
    assert data_digest(rows) != data_digest(rows[1:])
    assert data_digest([*rows, rows[0]]) != data_digest(rows)
    assert data_digest([replace(rows[0], loss_mask=(False, False, True)), *rows[1:]]) != data_digest(rows)
