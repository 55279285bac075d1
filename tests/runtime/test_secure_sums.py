"""Secure sums in a run: parties that drop out, requests in the clear, servers that lie, crashes, and sites' demands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from crashes import Crash, Disk, committed_once, go_on, lasting, share_the_base, some
from tiny import TinyFederation, records, write_jsonl

from fedllm.errors import FedllmError, PolicyError, RunFailed, RunPaused
from fedllm.job.check import check_job
from fedllm.job.policy import SUM_REQUESTS, check_operation
from fedllm.privacy import secure_sum
from fedllm.privacy.budget import PURSE_FOLDER
from fedllm.runs.folder import run_identity
from fedllm.runs.jsonl import read_rows
from fedllm.runtime import sum_messages, sum_party
from fedllm.runtime.federation import LinkedFederation
from fedllm.runtime.run import Watch, resume
from fedllm.scenarios.base import Reply
from fedllm.scenarios.fedhomollm_messages import Evaluate, Train
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.supervised import SupervisedTrainer
from fedllm.wire.payload import Payload

Make = Callable[..., TinyFederation]
SIZES = {"north": 6, "east": 9, "south": 4, "west": 5}
PLAN: dict[str, Any] = {
    "federation.num_rounds": 3,
    "federation.keep": "last",
    "federation.codec": {"name": "Grid", "limit": 0.5},
    "privacy.secure_aggregation": {"enabled": True},
}


class Failing:
    """Trains as usual, except for some parties in round 2."""

    def __init__(self, *parties: str) -> None:
        self.parties = parties

    def train(self, task: TrainTask, optimizer: Any) -> TrainSums:
        if task.party in self.parties and task.round == 2:
            raise RunFailed("NONFINITE", "it diverged")
        return SupervisedTrainer().train(task, optimizer)


def made(make: Make, name: str = "federation", **changes: Any) -> TinyFederation:
    return make(name, sizes=SIZES, job=PLAN | changes)


def plain(make: Make, name: str = "plain", **changes: Any) -> TinyFederation:
    return make(name, sizes=SIZES, job=PLAN | {"privacy.secure_aggregation": None} | changes)


def test_one_of_four_drops_out_and_the_sum_is_that_of_the_others(make_federation: Make) -> None:
    found = {
        federation.folder.name: federation.run(trainer=Failing("south"))
        for federation in (made(make_federation), plain(make_federation))
    }
    assert {result.status for result in found.values()} == {"PARTIAL"}
    assert found["federation"].adapter_sha256 == found["plain"].adapter_sha256


def test_two_of_four_drop_out_and_nothing_is_opened(make_federation: Make) -> None:
    federation = made(make_federation)
    with pytest.raises(RunPaused) as caught:
        federation.run(trainer=Failing("south", "west"))
    assert caught.value.code == "SUM_ABORTED"
    assert "2 of 4 parties" in caught.value.what and "south: NONFINITE, west: NONFINITE" in caught.value.what
    # What the server has of the round is nothing: its newest state is that of round 1.
    result = resume(federation.folder / "run")
    expected = made(make_federation, "unbroken").run()
    assert (result.status, result.adapter_sha256) == ("SUCCESS", expected.adapter_sha256)


class Seen(LinkedFederation):
    """A server that notes what it gets."""

    answers: ClassVar[list[tuple[str, Payload]]] = []

    def _asked(self, request: Any, round_: int, to: Any) -> Iterator[tuple[str, Payload]]:
        for party, payload in super()._asked(request, round_, to):
            self.answers.append((party, payload))
            yield party, payload


def test_the_server_gets_nothing_that_it_can_read(make_federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {}
    for federation in (made(make_federation), plain(make_federation)):
        Seen.answers = []
        monkeypatch.setattr("fedllm.runtime.run.LinkedFederation", Seen)
        federation.run()
        kinds[federation.folder.name] = {type(payload).__name__ for _, payload in Seen.answers}
        masked = [payload for _, payload in Seen.answers if isinstance(payload, sum_messages.Masked)]
    assert "Summand" in kinds["plain"] and "Summand" not in kinds["federation"]
    assert "Masked" in kinds["federation"] and not masked


def test_counts_on_a_grid_travel_in_three_or_four_bytes(make_federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedllm.runtime.run.LinkedFederation", Seen)
    widths = {}
    for weight_by in ("equal", "examples"):
        Seen.answers = []
        made(make_federation, weight_by, **{"federation.weight_by": weight_by}).run()
        masked = [payload for _, payload in Seen.answers if isinstance(payload, sum_messages.Masked)]
        updates = [t for payload in masked for name, t in payload.tensors.items() if name.startswith("update/")]
        widths[weight_by] = {tensor.element_size() * (3 if tensor.dim() == 2 else 1) for tensor in updates}
    assert widths == {"equal": {3}, "examples": {4}}


class Lying(LinkedFederation):
    """A server that asks for a sum's parts in the clear."""

    def total(self, request: Payload, *, round_: int, to: Any, manifest: Any, **options: Any) -> Any:
        if isinstance(request, Train | Evaluate) and round_ == 1:
            answers: list[Reply] = list(self.ask(request, round_=round_, to=to))
            raise AssertionError(
                {type(reply.payload).__name__: getattr(reply.payload, "code", "") for reply in answers}
            )
        return super().total(request, round_=round_, to=to, manifest=manifest, **options)


def test_a_party_refuses_to_send_its_update_in_the_clear(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedllm.runtime.run.LinkedFederation", Lying)
    with pytest.raises(AssertionError) as caught:
        made(make_federation).run()
    assert caught.value.args[0] == {"Failure": "SUM_IN_CLEAR"}
    # Without the switch, the same server sees them.
    with pytest.raises(AssertionError) as caught:
        plain(make_federation).run()
    assert caught.value.args[0] == {"Summand": ""}


def test_a_sum_that_was_opened_is_not_opened_again_without_one_of_its_parties(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = made(make_federation)
    expected = made(make_federation, "unbroken").run()

    def interrupt(self: Any, result: Any) -> None:
        if result.state.round == 2:
            raise KeyboardInterrupt
        commit(self, result)

    from fedllm.runtime.driver import Driver

    commit = Driver._commit
    monkeypatch.setattr(Driver, "_commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        federation.run()
    monkeypatch.setattr(Driver, "_commit", commit)
    # The sum of round 2 was opened for four. With three of them, the difference would be the fourth one's update.
    with pytest.raises(RunPaused) as caught:
        resume(federation.folder / "run", trainer=Failing("south"))
    assert caught.value.code == "SUM_ABORTED" and "north: COHORT_CHANGED" in caught.value.what
    assert resume(federation.folder / "run").adapter_sha256 == expected.adapter_sha256


def test_a_crash_at_touches_of_the_disk_changes_nothing_and_no_sum_has_two_sets_of_parties(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = made(make_federation)
    share_the_base(monkeypatch, federation)
    disk = Disk(monkeypatch)
    expected = federation.run("unbroken")
    points = disk.count
    agreed: dict[tuple[str, str], set[str]] = {}
    for point in some(range(1, points + 1), every=49):
        folder = f"crash{point}"
        with pytest.raises(Crash), disk.crashing_at(point):
            federation.run(folder)
        before = books(federation.folder, federation.folder / folder)
        result = go_on(federation, folder)
        assert (result.status, result.adapter_sha256) == ("SUCCESS", expected.adapter_sha256), point
        committed_once(result.path, 3)
        assert lasting(result.rows()) == lasting(expected.rows()), point
        after = books(federation.folder, result.path)
        assert all(after[key] == value for key, value in before.items())
        assert len(after) == 4 * 7
        for key, value in after.items():
            agreed.setdefault(key, set()).add(value)
    # The same parties were asked the same in every run, so what they agreed on is the same too.
    assert all(len(values) == 1 for values in agreed.values())


def pages(folder: Path) -> list[Path]:
    """Return the pages of the parties' books beside their files."""
    return sorted((folder / "parties" / PURSE_FOLDER).glob("*.sums/*.json"))


def books(folder: Path, run: Path) -> dict[tuple[str, str], str]:
    """Return what each party opened in a run, by round and what was summed."""
    run_id, found = run_identity(run)["run_id"] if (run / "run.json").exists() else "", {}
    for page in pages(folder):
        for row in json.loads(page.read_text()):
            if row["run"] == run_id:
                key = page.parent.stem, f"{row['round']}/{row['what']}"
                assert key not in found
                found[key] = json.dumps([row["asked"], row["parties"]])
    return found


def test_no_mask_comes_twice_in_a_round_that_is_repeated(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    monkeypatch.setattr("fedllm.runtime.run.LinkedFederation", Seen)
    federation = made(make_federation)
    for name in ("first", "second"):
        Seen.answers = []
        federation.run(name)
        masked = [payload for party, payload in Seen.answers if isinstance(payload, sum_messages.Masked)]
        seen += [tensor.numpy().tobytes() for payload in masked for tensor in payload.tensors.values()]
    assert len(seen) > 50 and len(set(seen)) == len(seen)


def test_a_damaged_book_stops_a_party(make_federation: Make) -> None:
    federation = made(make_federation)

    def damage(number: int, rows: Any) -> None:
        if number == 1:
            next(page for page in pages(federation.folder) if page.parent.name == "north.sums").write_text("{")
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.run(watch=Watch(on_round=damage))
    failed = [row for row in read_rows(federation.folder / "run" / "events.jsonl") if row["event"] == "party_failed"]
    assert {(row["party"], row["code"]) for row in failed} == {("north", "STATE_CORRUPT")}


def test_a_weight_above_the_largest_is_found_at_the_start(make_federation: Make) -> None:
    secure = {"privacy.secure_aggregation": {"enabled": True, "max_weight": 8}}
    with pytest.raises(RunFailed) as caught:
        made(make_federation, **secure).run()
    assert (caught.value.code, caught.value.where) == ("SUM_OVERFLOW", "party east")
    assert made(make_federation, "equal", **secure, **{"federation.weight_by": "equal"}).run().is_finished


def test_an_update_too_large_for_the_sum_is_refused_by_its_party(make_federation: Make) -> None:
    class Huge:
        def train(self, task: TrainTask, optimizer: Any) -> TrainSums:
            sums = SupervisedTrainer().train(task, optimizer)
            if task.party == "south" and task.round == 2:
                next(iter(task.model.trainable.values())).data[0, 0] = 1e9
            return sums

    result = made(make_federation, **{"federation.codec": {"name": "fp32"}}).run(trainer=Huge())
    failed = [row for row in read_rows(result.path / "events.jsonl") if row["event"] == "party_failed"]
    assert [(row["party"], row["round"], row["code"]) for row in failed] == [("south", 2, "SUM_OVERFLOW")]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "GeometricMedian": (
        {"federation.robust": {"name": "GeometricMedian", "num_malicious": 1}, "federation.min_parties": 3},
        "E01",
    ),
    "FLoRA": ({"federation.lora_rule": "FLoRA", "train.optimizer_state": "reset"}, "E01"),
    "FlexLoRA": ({"federation.lora_rule": "FlexLoRA", "train.optimizer_state": "reset"}, "E01"),
    "int8": ({"federation.codec": {"name": "int8"}}, "scales of int8 differ"),
    "TopK": ({"federation.codec": {"name": "TopK"}}, "places of TopK differ from party to party"),
    "RandomK": ({"federation.codec": {"name": "RandomK"}}, "the same places of RandomK, but as floats"),
    "bf16": ({"federation.codec": {"name": "bf16"}}, "bf16's own steps, which are no common grid"),
    "ranks": ({"federation.ranks": {"north": 1}, "federation.codec": None}, "different ranks"),
    "cohort": ({"federation.fraction_train": 0.5}, "E04"),
    "low threshold": ({"privacy.secure_aggregation": {"enabled": True, "threshold": 2}}, "E04"),
    "high threshold": ({"privacy.secure_aggregation": {"enabled": True, "threshold": 5}}, "E04"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_secure_sums_do_not_go_with_is_refused_and_allowed_without_them(case: str, make_federation: Make) -> None:
    changes, reason = REFUSED[case]
    federation = made(make_federation, **changes)
    with pytest.raises(FedllmError) as caught:
        check_job(federation.job(), federation.parties())
    found = [error for error in (caught.value, *caught.value.also) if reason in error.what]
    assert len(found) == 1 and found[0].fix
    allowed = plain(make_federation, **{key: value for key, value in changes.items() if not key.startswith("privacy")})
    check_job(allowed.job(), allowed.parties())


def test_two_parties_cannot_hide_from_each_other(make_federation: Make) -> None:
    federation = make_federation(sizes={"north": 4, "south": 3}, job=PLAN)
    with pytest.raises(FedllmError, match="a sum of 2 parties hides nobody"):
        check_job(federation.job(), federation.parties())


def test_a_site_that_demands_secure_sums_takes_part_in_jobs_with_them_only(make_federation: Make) -> None:
    limits = {"limits": {"require_secure_aggregation": True}}
    secure = make_federation("secure", sizes=SIZES, job=PLAN, party=limits)
    check_job(secure.job(), secure.parties())
    open_ = make_federation("open", sizes=SIZES, job=PLAN | {"privacy.secure_aggregation": None}, party=limits)
    with pytest.raises(PolicyError, match="only jobs with secure aggregation"):
        check_job(open_.job(), open_.parties())
    for kind in SUM_REQUESTS:
        check_operation(kind, job=secure.job(), party=secure.parties()[0].party)
        with pytest.raises(PolicyError):
            check_operation(kind, job=open_.job(), party=secure.parties()[0].party)


def test_the_policy_names_the_steps_of_a_sum() -> None:
    assert {cls.__name__ for cls in sum_messages.SUM_REQUESTS} == set(SUM_REQUESTS)


def test_a_sum_that_was_not_opened_binds_nobody_to_its_parties(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = made(make_federation)
    agreed = sum_party.PartySums.answer

    def gone(self: Any, request: Payload, round_: int) -> Payload:
        if isinstance(request, sum_messages.OpenSum) and round_ == 2 and self.party in ("south", "west"):
            raise RunFailed("PARTY_FAILED", "it is gone")
        return agreed(self, request, round_)

    monkeypatch.setattr(sum_party.PartySums, "answer", gone)
    with pytest.raises(RunPaused, match="sent their shares"):
        federation.run()
    monkeypatch.setattr(sum_party.PartySums, "answer", agreed)
    # Two gave their shares, which open nothing; the other two are bound to nothing, and three of them are enough.
    held = {key[0] for key in books(federation.folder, federation.folder / "run") if key[1] == "2/update"}
    assert held == {"north", "east"}
    with pytest.raises(RunPaused, match="COHORT_CHANGED"):
        resume(federation.folder / "run", trainer=Failing("south"))
    assert resume(federation.folder / "run").status == "SUCCESS"


STEPS_OF_A_SUM = ("KeysShown", "SharesSealed", "SharesTaken", "Masked", "SumAgreed", "SumOpened")


class Uncounted(Seen):
    """A server that asks for losses on the common test set as if no party kept anything of its own."""

    secure: ClassVar[bool] = False

    def total(self, request: Payload, *, round_: int, to: Any, **options: Any) -> Any:
        if not isinstance(request, Train) or round_ != 2:
            return super().total(request, round_=round_, to=to, **options)
        lie, every = Evaluate(adapter=dict(request.adapter), split="common", counted={}), self.parties
        Seen.answers = []
        if self.secure:
            super().total(lie, round_=1, to=every, manifest={})
        else:
            list(self.ask(lie, round_=1, to=every))
        raise AssertionError({type(payload).__name__: getattr(payload, "code", "") for _, payload in Seen.answers})


@pytest.mark.parametrize(
    ("rule", "secure", "expected"),
    [
        ("FedSA-LoRA", False, {"Failure": "SUM_IN_CLEAR"}),
        ("FedSA-LoRA", True, dict.fromkeys(STEPS_OF_A_SUM, "")),
        # Of a model that all have alike, the losses on the common test set are nobody's own.
        ("FedIT", False, {"Summand": ""}),
    ],
)
def test_what_is_private_follows_from_the_job_not_from_the_request(
    rule: str, secure: bool, expected: dict[str, str], make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedllm.runtime.run.LinkedFederation", type("Lies", (Uncounted,), {"secure": secure}))
    federation = made(
        make_federation,
        **{"federation.lora_rule": rule, "evaluate.test": "data/test.jsonl", "federation.eval_every": 2},
    )
    write_jsonl(federation.folder / "data" / "test.jsonl", records("test", 3))
    with pytest.raises(AssertionError) as caught:
        federation.run()
    assert caught.value.args[0] == expected


def test_a_party_whose_key_no_secret_can_be_agreed_with_is_named_and_left_out(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = secure_sum.Member.keys

    def zero(self: secure_sum.Member) -> secure_sum.Keys:
        keys = shown(self)
        if self.name == "south":
            keys = replace(keys, mask_key="00" * 32)
            keys = replace(keys, signature=self.signatures.sign(keys.text(self.context, self.name)).hex())
        return keys

    monkeypatch.setattr(secure_sum.Member, "keys", zero)
    result = made(make_federation).run()
    failed = [row for row in read_rows(result.path / "events.jsonl") if row["event"] == "party_failed"]
    assert {(row["party"], row["code"]) for row in failed} == {("south", "SUM_REFUSED")}
    assert result.status == "PARTIAL"
