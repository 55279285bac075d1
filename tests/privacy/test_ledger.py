"""The ledger and the budget: paid before drawn, once per release, over all runs, and noticed when tampered with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import BudgetExhausted, ExitCode, StateLost
from fedllm.privacy.accountant import Mechanism, epsilon_of
from fedllm.privacy.budget import Budget, Purse
from fedllm.privacy.ledger import Charge, Ledger, spent_on
from fedllm.privacy.terms import Terms

ROUND = Mechanism(0.1, 1.0, 5)
TERMS = Terms("example", "rows:d", ROUND, 1e-5, "RDP", None)


def charge(**changes: Any) -> Charge:
    values = {"data": "rows:d", "unit": "example", "run": "r", "round": 1, "inputs": "i", "noise": "k"}
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
    assert spent_on(book.charges(), "rows:d", unit="example") == [first.mechanism, second.mechanism]
    assert spent_on(book.charges(), "rows:other", unit="example") == []


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
    second.open_round(2, "i", replace(TERMS, data="rows:e"))


def at_once(spend: Callable[[str], None]) -> None:
    """Have three runs spend at the same time: the ledger is locked by file, so threads stand for processes."""
    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(spend, name) for name in ("run1", "run2", "run3")]:
            done.result()


def test_two_runs_at_once_lose_no_charge(tmp_path: Path) -> None:
    def spend(name: str) -> None:
        own = budget(tmp_path, name)
        for number in range(1, 6):
            own.open_round(number, "i", TERMS)

    at_once(spend)
    assert len(ledger(tmp_path).charges()) == 15


def test_a_site_s_limit_holds_when_runs_ask_at_once(tmp_path: Path) -> None:
    def spend(name: str) -> None:
        with suppress(BudgetExhausted):
            for number in range(1, 6):
                budget(tmp_path, name, most=spent(35)).open_round(number, "i", TERMS)

    at_once(spend)
    assert len(ledger(tmp_path).charges()) == 7


BY_WHO = {"unit": "group", "group_by": "who"}


@pytest.mark.parametrize(
    ("paid", "asked"),
    [
        (BY_WHO, {"unit": "example"}),
        (BY_WHO, BY_WHO),
        ({"unit": "party"}, {"unit": "example"}),
        ({"unit": "party"}, BY_WHO),
        ({"unit": "party"}, {"unit": "party"}),
    ],
)
def test_what_hid_more_counts_for_what_hides_less(paid: dict[str, str], asked: dict[str, str]) -> None:
    found = charge(**paid)
    assert spent_on([found], "rows:d", **asked) == [found.mechanism]


@pytest.mark.parametrize(
    ("paid", "asked"),
    [
        ({"unit": "example"}, BY_WHO),
        ({"unit": "example"}, {"unit": "party"}),
        (BY_WHO, {"unit": "party"}),
        # By another column they are other persons: one that numbers the rows would make each a person.
        ({"unit": "group", "group_by": "row"}, BY_WHO),
    ],
)
def test_what_hid_less_bounds_nothing_and_is_refused(
    paid: dict[str, str], asked: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(BudgetExhausted) as caught:
        spent_on([charge(**BY_WHO), charge(**paid)], "rows:d", **asked)
    assert (caught.value.code, caught.value.exit_code) == ("BUDGET_OTHER_UNIT", ExitCode.BUDGET)
    budget(tmp_path, "run1").open_round(1, "i", replace(TERMS, **paid))
    before = ledger(tmp_path).path.read_bytes()
    with pytest.raises(BudgetExhausted, match="BUDGET_OTHER_UNIT"):
        budget(tmp_path, "run2").open_round(1, "i", replace(TERMS, **asked))
    assert ledger(tmp_path).path.read_bytes() == before


def test_persons_of_other_data_are_free_and_a_party_has_only_itself() -> None:
    charges = [charge(unit="example")]
    assert spent_on(charges, "rows:other", **BY_WHO) == []
    with pytest.raises(BudgetExhausted):
        spent_on(charges, "rows:other", unit="party")
    whole = charge(unit="party", data="of all")
    assert spent_on([whole], "rows:other", **BY_WHO) == [whole.mechanism]


@pytest.mark.parametrize(("paid", "asked"), [("e" * 64, "rows:d"), ("", "rows:d"), ("rows:d", "")])
def test_where_the_rows_are_not_known_a_charge_counts_for_all(paid: str, asked: str) -> None:
    found = charge(data=paid)
    assert spent_on([found], asked, unit="example") == [found.mechanism]


def test_a_ledger_from_before_the_digest_of_rows_is_read_and_counts_for_all_data(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    body = asdict(charge(data="d" * 64))
    del body["group_by"]
    hash_ = hashlib.sha256(("0" * 64 + json.dumps(body, separators=(",", ":"), sort_keys=True) + "\n").encode())
    book.path.parent.mkdir()
    line = body | {"before": "0" * 64, "hash": hash_.hexdigest()}
    book.path.write_text(json.dumps(line) + "\n")
    own = budget(tmp_path, most=spent(10))
    own.open_round(1, "i", TERMS)
    assert own.spent_by_all(TERMS) == spent(10)
    assert own.spent_by_all(replace(TERMS, data="rows:e")) == spent(5)
    line = body | {"data": "rows:e", "before": "0" * 64, "hash": hash_.hexdigest()}
    book.path.write_text(json.dumps(line) + "\n")
    with pytest.raises(StateLost):
        book.charges()
