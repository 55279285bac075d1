"""A party's book of opened sums: neither another run nor another round opens one again without one of its parties."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_secure_sums import PLAN, SIZES, made, pages
from tiny import TinyFederation

from fedllm.errors import FedllmError, PayloadError, RunFailed, RunPaused, StateLost
from fedllm.privacy.budget import PURSE_FOLDER
from fedllm.runs.jsonl import write_json
from fedllm.runtime import sum_book, sum_messages, sum_server
from fedllm.runtime.audit import audit_job
from fedllm.runtime.federation import LinkedFederation
from fedllm.runtime.sum_book import Opened, SumBook
from fedllm.scenarios.base import Total
from fedllm.scenarios.fedhomollm_messages import Train, select
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.supervised import SupervisedTrainer
from fedllm.wire.payload import Payload, Tensors

Make = Callable[..., TinyFederation]
EXACT = {"federation.codec": {"name": "fp32"}, "federation.num_rounds": 1}
JOB = "0" * 64
FOUR = Opened("run", 2, "update", "asked", "tensors", ("a", "b", "c", "d"))


class Spy:
    """Trains, notes what each party's update is, and lets some parties fail."""

    def __init__(self, *fail: str) -> None:
        self.fail, self.updates = fail, dict[str, Tensors]()

    def train(self, task: TrainTask, optimizer: Any) -> TrainSums:
        if task.party in self.fail:
            raise RunFailed("NONFINITE", "it diverged")
        start = task.model.read()
        sums = SupervisedTrainer().train(task, optimizer)
        end = task.model.read()
        self.updates[task.party] = {name: end[name] - start[name] for name in end}
        return sums


class Noting(LinkedFederation):
    """A server that notes the sums of updates."""

    totals: ClassVar[list[Total]] = []

    def total(self, request: Payload, **options: Any) -> Total:
        total = super().total(request, **options)
        if isinstance(request, Train):
            self.totals.append(total)
        return total


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def relative_error(whole: Total, less: Total, update: Tensors) -> float:
    """Return how far what two sums differ by is from an update of a party that is in one of them."""
    sums = [flat(select("update", total.means)) * total.weight for total in (whole, less)]
    true = flat(update) * (whole.weight - less.weight)
    return float((sums[0] - sums[1] - true).norm() / true.norm())


def test_two_runs_of_a_job_do_not_give_a_party_away_unless_the_book_is_emptied(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedllm.runtime.run.LinkedFederation", Noting)
    Noting.totals = []
    federation, spy = made(make_federation, **EXACT), Spy()
    federation.run("first", trainer=spy)
    assert len(Noting.totals) == 1 and len(pages(federation.folder)) == 4
    with pytest.raises(RunPaused) as caught:
        federation.run("second", trainer=Spy("south"))
    assert caught.value.code == "SUM_ABORTED"
    assert all(f"{party}: COHORT_CHANGED" in caught.value.what for party in ("north", "east", "west"))
    assert len(Noting.totals) == 1
    # The same parties may run the job as often as they like.
    federation.run("third")
    assert len(Noting.totals) == 2
    for page in pages(federation.folder):
        page.unlink()
    federation.run("fourth", trainer=Spy("south"))
    whole, _, less = Noting.totals
    assert set(whole.parties) - set(less.parties) == {"south"}
    assert relative_error(whole, less, spy.updates["south"]) < 1e-3


def test_worker_processes_keep_the_book_beside_the_party_files(make_federation: Make) -> None:
    federation = made(make_federation, **EXACT)
    federation.run("first", num_workers=2)
    assert [page.parent.name for page in pages(federation.folder)] == [f"{name}.sums" for name in sorted(SIZES)]
    with pytest.raises(RunPaused, match="COHORT_CHANGED"):
        federation.run("second", trainer=Spy("south"))


def test_an_audit_has_a_book_of_its_own(make_federation: Make) -> None:
    federation = made(make_federation, **EXACT)
    audited = federation.folder / "audited"
    audit_job(federation.job(), canaries=20, output=audited)
    assert not pages(federation.folder)
    assert len(list((audited / PURSE_FOLDER).glob("*.sums/*.json"))) == 4


class Done(Exception):
    """What a lying server wanted to know."""


class Asking(LinkedFederation):
    """A server that has the sum of round 1, and asks for it once more in another round, of some parties."""

    number: ClassVar[int] = 2
    without: ClassVar[str] = ""
    forget: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def total(self, request: Payload, *, round_: int, to: Any, **options: Any) -> Total:
        total = super().total(request, round_=round_, to=to, **options)
        if not isinstance(request, Train):
            return total
        type(self).forget()
        some = [party for party in to if party != self.without]
        raise Done(super().total(request, round_=self.number, to=some, **options).parties)


def asked_again(make: Make, monkeypatch: pytest.MonkeyPatch, name: str, **lie: Any) -> Any:
    monkeypatch.setattr("fedllm.runtime.run.LinkedFederation", type("Asks", (Asking,), lie))
    federation = made(make, name)
    if lie.pop("emptied", False):
        forget = staticmethod(lambda: [page.unlink() for page in pages(federation.folder)])
        monkeypatch.setattr("fedllm.runtime.run.LinkedFederation", type("Asks", (Asking,), lie | {"forget": forget}))
    with pytest.raises((Done, FedllmError)) as caught:
        federation.run()
    return caught.value.args[0] if isinstance(caught.value, Done) else str(caught.value)


def test_the_same_model_in_another_round_is_summed_for_the_same_parties_only(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "north: COHORT_CHANGED" in asked_again(make_federation, monkeypatch, "less", without="south")
    assert asked_again(make_federation, monkeypatch, "same") == tuple(SIZES)
    # Without the book the server would have both sums.
    less = asked_again(make_federation, monkeypatch, "emptied", without="south", emptied=True)
    assert less == tuple(name for name in SIZES if name != "south")


def test_no_sum_is_opened_in_a_round_that_the_job_does_not_have(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = PLAN["federation.num_rounds"]
    assert asked_again(make_federation, monkeypatch, "last", number=last) == tuple(SIZES)
    found = asked_again(make_federation, monkeypatch, "beyond", number=last + 1)
    assert all(f"{party}: SUM_REFUSED" in found for party in SIZES)


def test_a_second_list_of_parties_is_not_noted_in_place_of_the_first(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = sum_server.SecureTotal._each

    def twice(self: Any, request: Any, to: Any, expected: Any) -> Any:
        yield from each(self, request, to, expected)
        if isinstance(request, sum_messages.AgreeSum):
            second = request.model_copy(update={"survivors": request.survivors[:3]})
            assert not list(each(self, second, request.survivors[:3], expected))

    monkeypatch.setattr(sum_server.SecureTotal, "_each", twice)
    federation = made(make_federation, **EXACT)
    federation.run()
    found = [row["parties"] for page in pages(federation.folder) for row in json.loads(page.read_text())]
    assert found and all(parties == sorted(SIZES) for parties in found)


REFUSED = {
    "other parties": {"parties": ("a", "b", "c")},
    "other parties in another run": {"parties": ("a", "b", "c"), "run": "another"},
    "other parties of another request": {"parties": ("a", "b", "c"), "asked": "another", "tensors": "other"},
    "other parties in another round": {"parties": ("a", "b", "c"), "round": 3, "asked": "another"},
    "more parties": {"parties": ("a", "b", "c", "d", "e")},
    "another request": {"asked": "another"},
}
ALLOWED: dict[str, dict[str, Any]] = {
    "the same": {},
    "another run": {"run": "another"},
    "another request in another run": {"run": "another", "asked": "another", "tensors": "other"},
    "another round of another model": {"round": 3, "tensors": "other", "parties": ("a", "b", "c")},
    "something else": {"what": "held_out", "parties": ("a", "b", "c")},
}


@pytest.mark.parametrize("case", [*REFUSED, *ALLOWED])
def test_what_a_book_lets_be_opened(case: str, tmp_path: Path) -> None:
    book = SumBook(tmp_path / "a.sums", "a")
    book.note(JOB, FOUR)
    new = replace(FOUR, **REFUSED.get(case) or ALLOWED[case])
    if case in ALLOWED:
        book.check(JOB, new)
        book.note(JOB, new)
        assert len(json.loads(book.page(JOB).read_text())) == 1 + (new != FOUR)
        return
    for step in (book.check, book.note):
        with pytest.raises(PayloadError, match="COHORT_CHANGED") as caught:
            step(JOB, new)
        assert caught.value.fix and "of round 2" in caught.value.what
    assert len(json.loads(book.page(JOB).read_text())) == 1
    # Another job has a page of its own, and a model without tensors is no model.
    book.note("1" * 64, new)


def test_requests_without_tensors_are_not_taken_for_one_model(tmp_path: Path) -> None:
    book, bare = SumBook(tmp_path / "a.sums", "a"), replace(FOUR, tensors="")
    book.note(JOB, bare)
    book.note(JOB, replace(bare, round=3, parties=("a", "b", "c")))


def test_of_two_runs_at_once_one_opens_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(path: Path, value: Any) -> None:
        time.sleep(0.2)
        write_json(path, value)

    monkeypatch.setattr(sum_book, "write_json", slowly)
    book = SumBook(tmp_path / "a.sums", "a")

    def noted(parties: tuple[str, ...]) -> str:
        try:
            book.note(JOB, replace(FOUR, run=parties[-1], parties=parties))
        except PayloadError as error:
            return error.code
        return "noted"

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(noted, [("a", "b", "c", "d"), ("a", "b", "c")]))
    assert sorted(found) == ["COHORT_CHANGED", "noted"]


@pytest.mark.parametrize("text", ["{", "[1]", "7", '[{"run": "r"}]', '[{"parties": []}]'])
def test_a_book_that_cannot_be_read_is_an_error(text: str, tmp_path: Path) -> None:
    book = SumBook(tmp_path / "a.sums", "a")
    book.note(JOB, FOUR)
    book.page(JOB).write_text(text)
    for step in (book.check, book.note):
        with pytest.raises(StateLost, match="STATE_CORRUPT"):
            step(JOB, FOUR)
    assert book.page(JOB).read_text() == text
