"""Every tuning method x family x task: two parties train it together through the wire, or it is refused with a reason.

`make test` takes one method for each family and task, `make conformance` takes all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from combinations import LABELS, METHODS, Combination, combinations, sample
from families import FAMILIES, TASKS, save_family
from table import allowed_on_page
from tiny import TinyFederation, records, write_jsonl

from fedllm.evaluate.loss import LossSums, evaluate_examples
from fedllm.models.deliver import load_adapter
from fedllm.models.load import load_base
from fedllm.runs.jsonl import Row
from fedllm.runtime.run import RunResult, Watch, resume
from fedllm.runtime.site import open_site, party_tokens
from fedllm.tasks import CLASSIFICATION, TaskName

Bases = Callable[[str, TaskName], Path]
Make = Callable[..., TinyFederation]
CHOSEN = list(sample(1 if os.environ.get("FEDLLM_CONFORMANCE") == "all" else len(METHODS)))
ALLOWED = allowed_on_page()
SIZES = {"north": 4, "south": 3}


class Stop(BaseException):
    """Ends a process after the first round."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A function that returns the folder of a tiny model of a family, written once."""
    root = tmp_path_factory.mktemp("families")

    def base(family: str, task: TaskName) -> Path:
        folder = root / f"{family}-{task}"
        return folder if folder.exists() else save_family(family, task, folder)

    return base


def federation_of(one: Combination, base: Path, make: Make) -> TinyFederation:
    job: dict[str, Any] = {"peft": one.settings, "data.task": one.task, "train.learning_rate": 0.02}
    # With `best` some would deliver what nothing has been learned of, and what is delivered would prove nothing.
    job["federation.keep"] = "last"
    if one.task == CLASSIFICATION:
        job["data.labels"] = list(LABELS)
    federation = make(base=base, sizes=SIZES, job=job)
    for path in (federation.folder / "data").glob("*.jsonl") if one.task == CLASSIFICATION else ():
        rows = records(path.stem, len(path.read_text().splitlines()))
        labelled = [{"text": row["prompt"], "label": LABELS[i % 3]} for i, row in enumerate(rows)]
        write_jsonl(path, labelled)
    return federation


def stop_after_the_first(number: int, rows: list[Row]) -> None:
    if number == 1:
        raise Stop


def held_out_loss(one: Combination, federation: TinyFederation, result: RunResult) -> float:
    """Return the held-out loss of the delivered adapter, loaded on a fresh base model as a user would."""
    job, parties = federation.job(), federation.parties()
    site = open_site(job, parties)
    base = load_base(job.model, folder=site.folder, task=one.whole_task)
    model = load_adapter(base.model, result.path / "adapter")
    held_out = [party_tokens(site, located).held_out for located in parties]
    sums = [evaluate_examples(model, tokens, pad_id=base.tokenizer.pad_token_id, batch_size=4) for tokens in held_out]
    return sum(sums, LossSums()).loss_nats


def test_the_page_has_a_cell_for_each_combination() -> None:
    assert set(ALLOWED) == set(combinations())


def test_each_family_and_task_and_method_is_among_those_tried() -> None:
    assert {(one.family, one.task) for one in CHOSEN} == {(name, task) for task in TASKS for name in TASKS[task]}
    assert {one.family for one in CHOSEN} == set(FAMILIES)
    assert {one.method for one in CHOSEN} == set(METHODS)


@pytest.mark.parametrize("one", CHOSEN, ids=lambda one: f"{one.task}, {one.family}, {one.method}")
def test_two_parties_tune_it_resume_to_the_same_bits_and_deliver_what_they_judged(
    one: Combination, bases: Bases, make_federation: Make
) -> None:
    base = bases(one.family, one.task)
    reason = one.refusal(base)
    assert ALLOWED[one] == (reason is None), "the page differs: make reference"
    if reason is not None:
        assert len(reason) > 20
        return
    federation = federation_of(one, base, make_federation)
    whole = federation.run("whole")
    with pytest.raises(Stop):
        federation.run("broken", watch=Watch(on_round=stop_after_the_first))
    resumed = resume(federation.folder / "broken")
    assert (resumed.status, resumed.adapter_sha256) == ("SUCCESS", whole.adapter_sha256)
    values = {(row["round"], row["split"], row["name"]): row["value"] for row in whole.rows() if row["party"] is None}
    assert values[1, None, "update_norm"] > 0
    assert values[2, None, "update_norm"] > 0
    judged = values[2, "held_out", "loss_nats"]
    assert judged != values[0, "held_out", "loss_nats"]
    assert held_out_loss(one, federation, whole) == pytest.approx(judged, rel=1e-4)
