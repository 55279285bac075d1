"""A site's limits: what each refuses, that it does so only when it is set, and that the error says all."""

from __future__ import annotations

from typing import Any

import pytest

from fedllm.errors import ConfigError, ExitCode, PolicyError
from fedllm.job.check import check_job
from fedllm.job.job import Job, LocatedParty
from fedllm.job.party import Limits, Party
from fedllm.job.policy import (
    HANDSHAKE_REQUESTS,
    Upload,
    check_operation,
    check_policy,
    check_upload,
    refused_operations,
    rules,
)
from fedllm.runtime.base import HANDSHAKE
from fedllm.scenarios import SCENARIOS


def make_job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "name": "tiny",
        "parties": ["north", "east", "south"],
        "federation": {"num_rounds": 5, "min_parties": 2},
        "model": {"model_name_or_path": "base"},
        "train": {"local_steps": 2, "learning_rate": 0.01},
    }
    return Job.model_validate(values | changes)


def make_party(**limits: Any) -> Party:
    return Party.model_validate({"name": "north", "data": {"train": "x.jsonl"}, "limits": limits})


JOB = make_job()
SENT = Upload(per_round=1000, total=6000)

# Limits that forbid the job, limits that just allow it, and words of the error: what is asked and what is allowed.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "allowed_scenarios": (
        {"allowed_scenarios": ["Other"]},
        {"allowed_scenarios": ["Other", "FedHomoLLM"]},
        ("FedHomoLLM", "Other"),
    ),
    "allowed_methods": ({"allowed_methods": []}, {"allowed_methods": ["LORA"]}, ("LORA", "none")),
    "allowed_operations": (
        {"allowed_operations": ["SendInitial", "Evaluate"]},
        {"allowed_operations": ["Train"]},
        ("Train", "Evaluate"),
    ),
    "max_rounds": ({"max_rounds": 4}, {"max_rounds": 5}, ("5 rounds", "4 at most", "federation.num_rounds")),
    "min_parties": ({"min_parties": 4}, {"min_parties": 2}, ("3 parties", "4 or more", "add parties")),
    "max_upload_bytes_per_round": (
        {"max_upload_bytes_per_round": 999},
        {"max_upload_bytes_per_round": 1000},
        ("1000", "999 at most", "peft.r"),
    ),
    "max_upload_bytes": ({"max_upload_bytes": 5999}, {"max_upload_bytes": 6000}, ("6000", "5999 at most")),
    "require_secure_aggregation": (
        {"require_secure_aggregation": True},
        {"require_secure_aggregation": False},
        ("no secure aggregation", "privacy.secure_aggregation.enabled"),
    ),
    "max_epsilon": (
        {"max_epsilon": 8.0},
        {"max_epsilon": None},
        ("without differential privacy", "8", "unit: example"),
    ),
}


@pytest.mark.parametrize("key", CASES)
def test_a_limit_refuses_what_passes_it_and_says_all(key: str) -> None:
    forbidding, allowing, words = CASES[key]
    assert check_policy(JOB, make_party(**allowing), upload=SENT) == []
    error, *_ = check_policy(JOB, make_party(**forbidding), upload=SENT)
    assert (error.code, error.exit_code) == ("POLICY_REFUSED", ExitCode.REFUSED)
    assert error.where == f"party north, limits.{key}"
    assert error.fix
    assert [word for word in (f"`{key}`", *words) if word not in str(error)] == []


def test_every_limit_is_tested() -> None:
    # The last are about approvals, tests/job/test_approval.py, about private jobs, below, and about what comes in,
    # tests/runtime/test_package_wire.py.
    assert set(CASES) | {"require_approval", "max_delta", "max_package_bytes"} == set(Limits.model_fields)


def test_without_limits_every_job_may_run() -> None:
    assert check_policy(JOB, make_party(), upload=Upload(2**60, 2**70)) == []


def test_all_broken_limits_are_told_at_once() -> None:
    limits = {"max_rounds": 1, "min_parties": 9, "max_epsilon": 1.0}
    keys = [error.where.rpartition(".")[2] for error in check_policy(JOB, make_party(**limits))]
    assert keys == ["max_rounds", "min_parties", "min_parties", "max_epsilon"]


def test_the_least_number_of_parties_holds_for_each_round_too() -> None:
    (error,) = check_policy(JOB, make_party(min_parties=3))
    assert "rounds with 2 parties" in error.what and "federation.min_parties" in error.fix
    assert check_policy(make_job(federation={"num_rounds": 5, "min_parties": 3}), make_party(min_parties=3)) == []
    # By default no round may hold the update of a single party.
    (error,) = check_policy(make_job(federation={"num_rounds": 5, "min_parties": 1}), make_party())
    assert "rounds with 1 parties" in error.what


def test_a_yardstick_of_one_party_needs_no_others() -> None:
    alone = make_job(parties=["north"], federation={"num_rounds": 5, "min_parties": 1})
    assert check_policy(alone, make_party(), baseline=True) == []
    assert len(check_policy(alone, make_party())) == 2
    assert len(check_policy(alone, make_party(max_rounds=1), baseline=True)) == 1


def test_rules_show_limits_that_hold_and_that_do_not() -> None:
    found = {rule.key: rule.holds for rule in rules(JOB, make_party(max_rounds=4), upload=SENT)}
    assert found == {key: key != "max_rounds" for key in CASES}
    assert "max_upload_bytes" not in {rule.key for rule in rules(JOB, make_party())}


def test_the_job_check_asks_the_policy() -> None:
    def located(**limits: Any) -> list[LocatedParty]:
        return [LocatedParty(party=make_party(**limits), base_dir=JOB.base_dir)]

    check_job(JOB, located())
    with pytest.raises(PolicyError) as caught:
        check_job(JOB, located(max_rounds=1, allowed_methods=["IA3"]))
    assert [error.code for error in (caught.value, *caught.value.also)] == ["POLICY_REFUSED"] * 2


# What leaves the site, and what it answers


def test_what_was_sent_is_held_against_both_limits() -> None:
    party = make_party(max_upload_bytes_per_round=10, max_upload_bytes=100)
    assert check_upload(Upload(10, 100), party) == []
    assert len(check_upload(Upload(11, 100), party)) == 1
    assert len(check_upload(Upload(11, 101), party)) == 2


def test_a_site_answers_the_requests_of_the_scenario_and_the_handshake() -> None:
    for kind in ("SendInitial", "Train", "Evaluate", *HANDSHAKE_REQUESTS):
        check_operation(kind, job=JOB, party=make_party())


@pytest.mark.parametrize("kind", ["Evaluate", "SendInitial"])
def test_a_site_refuses_a_request_that_it_does_not_allow(kind: str) -> None:
    party = make_party(allowed_operations=["Train"])
    assert check_policy(JOB, party) == []
    assert set(refused_operations(JOB, party)) == {"Evaluate", "SendInitial"}
    check_operation("Train", job=JOB, party=party)
    check_operation("Hello", job=JOB, party=party)
    with pytest.raises(PolicyError, match=f"allowed_operations.*`{kind}`"):
        check_operation(kind, job=JOB, party=party)


@pytest.mark.parametrize("kind", ["Trian", "Failure", "Summand", "Saved", "os.system", "x" * 5000])
def test_a_request_of_no_scenario_is_refused(kind: str) -> None:
    with pytest.raises(PolicyError) as caught:
        check_operation(kind, job=JOB, party=make_party(allowed_operations=[kind]))
    assert len(str(caught.value)) < 1000


def test_the_handshake_is_that_of_the_runtime() -> None:
    replies = {"Ready", "Done", "Shown", "HeadSigned"}
    # A copy is taken only where the job says that there are copies.
    assert set(HANDSHAKE_REQUESTS) == set(HANDSHAKE) - replies - {"Copy"}


def test_a_copy_is_taken_only_in_a_job_that_asks_for_copies() -> None:
    check_operation("Copy", job=make_job(ownership={"trace": "delivered"}), party=make_party())
    with pytest.raises(PolicyError):
        check_operation("Copy", job=JOB, party=make_party())


def test_every_scenario_has_a_request_that_a_site_must_answer() -> None:
    # Otherwise a job that a site can have no part in would begin.
    assert [name for name, line in SCENARIOS.items() if not any(r.commits for r in line.requests)] == []


@pytest.mark.parametrize("limits", [{"max_epsilon": 0}, {"max_upload_bytes": 0}, {"require_approval": "no"}])
def test_limits_out_of_range_are_refused(tmp_path: Any, limits: dict[str, Any]) -> None:
    from tiny import write_yaml

    from fedllm.job.loading import load_model

    file = write_yaml(tmp_path / "party.yaml", {"name": "north", "data": {"train": "x"}, "limits": limits})
    with pytest.raises(ConfigError, match=f"BAD_VALUE.*limits.{next(iter(limits))}"):
        load_model(Party, file, overrides=[])


def private_job(**asked: Any) -> Job:
    return make_job(privacy={"differential_privacy": {"unit": "example", **asked}})


@pytest.mark.parametrize(
    ("asked", "keys"),
    [
        ({"epsilon": 3.0}, []),
        ({"epsilon": 3.1}, ["max_epsilon"]),
        # What follows from the noise is not known before the data are.
        ({"noise_multiplier": 50.0}, ["max_epsilon"]),
        ({"epsilon": 3.0, "delta": 1e-4}, ["max_delta"]),
        ({"epsilon": 0.001, "delta": 0.01}, ["max_delta"]),
    ],
)
def test_a_site_with_a_limit_runs_private_jobs_within_it(asked: dict[str, Any], keys: list[str]) -> None:
    errors = check_policy(private_job(**asked), make_party(max_epsilon=3.0))
    assert [error.where.rpartition(".")[2] for error in errors] == keys
    assert check_policy(private_job(**asked), make_party()) == []


def test_noise_that_a_server_adds_is_not_what_a_site_with_a_limit_asks_for() -> None:
    """The server has the updates before there is noise on them, and no ledger of the site knows of it."""
    asked = {"unit": "party", "epsilon": 2.0}
    (error,) = check_policy(private_job(**asked), make_party(max_epsilon=3.0))
    assert "when it has the updates" in error.what and "distributed" in error.fix
    assert check_policy(private_job(**asked), make_party()) == []
    assert check_policy(private_job(**asked, placement="distributed"), make_party(max_epsilon=3.0)) == []


def test_a_site_that_bears_a_larger_delta_says_so() -> None:
    assert check_policy(private_job(epsilon=3.0, delta=1e-4), make_party(max_epsilon=3.0, max_delta=1e-4)) == []


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        ({"data": {"packing": True}}, "data.packing", "E07"),
        ({"train": {"local_steps": 2, "bf16": True}}, "train.bf16", "float32"),
        ({"train": {"local_steps": 2, "gradient_checkpointing": True}}, "train.gradient_checkpointing", "single"),
        ({"train": {"local_steps": 2, "max_grad_norm": 0.5}}, "train.max_grad_norm", "clip_norm"),
        ({"federation": {"num_rounds": 5, "weight_by": "tokens"}}, "federation.weight_by", "E05"),
    ],
)
def test_what_breaks_the_bound_of_an_example_is_refused(section: dict[str, Any], key: str, words: str) -> None:
    asked = {"privacy": {"differential_privacy": {"unit": "example", "epsilon": 3.0}}}
    with pytest.raises(ConfigError) as caught:
        check_job(make_job(**section, **asked), [])
    assert (caught.value.code, caught.value.where) == ("BAD_COMBINATION", key)
    assert words in str(caught.value)
    check_job(make_job(**section), [])
    check_job(make_job(**asked), [])
