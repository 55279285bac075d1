"""`fedllm audit` as a user types it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import TinyFederation, tiny_federation
from verbs import Call, data_of

from fedllm.errors import ExitCode

FAST = {"federation.num_rounds": 1, "train.local_steps": 1}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, base: Path) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("audit"), base, job=FAST)


def test_a_run_has_a_table_of_members(call: Call, federation: TinyFederation) -> None:
    run = federation.run("finished").path
    code, out, _ = call("audit", run)
    assert code == 0
    assert "AUC" in out and "too few" in out and "none were planted" in out
    code, out, _ = call("audit", run, "--json")
    found = data_of(out)
    assert (code, found["canaries"], found["claim"], found["refutes_claim"]) == (0, None, None, None)
    assert [row["party"] for row in found["membership"]] == ["north", "east", "south"]


def test_a_job_is_run_with_canaries_and_the_claim_decides_the_exit_code(
    call: Call, federation: TinyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedllm.runtime import audit
    from fedllm.runtime.audit import Claim

    path = federation.folder / "audited"
    code, out, _ = call("audit", federation.job_file, "--canaries", "24", "--copies", "2", "-o", path)
    assert code == 0
    assert "of 24 planted, 2 times each" in out and "claim     none" in out
    assert "words in updates" in out and "the sum" in out and "span" in out
    code, out, _ = call("audit", path, "--json")
    assert code == 0 and data_of(out)["canaries"]["copies"] == 2

    monkeypatch.setattr(audit, "claimed", lambda job, run: Claim(1.0, 1e-5, "example"))
    code, out, _ = call("audit", path)
    assert code == 0 and "epsilon 2.000: not refuted" in out
    monkeypatch.setattr(audit, "claimed", lambda job, run: Claim(-1.0, 0.0, "example"))
    code, out, _ = call("audit", path)
    assert code == ExitCode.BUDGET and "REFUTED" in out
    code, out, _ = call("audit", path, "--json")
    assert code == ExitCode.BUDGET and '"exit_code": 6' in out and '"status": "refuted"' in out


@pytest.mark.parametrize(
    "option", [("--canaries", "30"), ("--texts", "0"), ("--copies", "2"), ("--set", "seed=3"), ("-o", "elsewhere")]
)
def test_options_of_a_job_are_refused_for_a_run(
    option: tuple[str, str], call: Call, make_federation: Callable[..., Any]
) -> None:
    code, _, err = call("audit", make_federation().folder, *option)
    assert code == ExitCode.USAGE and "BAD_COMBINATION" in err


def test_a_site_judges_the_adapter_that_was_delivered_to_it(call: Call, federation: TinyFederation) -> None:
    run = federation.run("delivered").path
    north = ("--party", federation.folder / "parties" / "north.yaml")
    code, out, _ = call("audit", federation.job_file, "--adapter", run / "adapter", *north, "--json")
    (row,) = data_of(out)["membership"]
    assert code == 0
    _, out, _ = call("audit", run, "--json")
    assert row == data_of(out)["membership"][0]
    assert not (run / "adapter" / "audit.json").exists()
    code, out, _ = call("audit", federation.job_file, "--adapter", run / "adapter", *north)
    assert code == 0 and "north" in out and "audit.json" not in out
    code, _, err = call("audit", federation.job_file, "--adapter", run / "adapter")
    assert code == ExitCode.USAGE and "MISSING_KEY" in err
    code, _, err = call("audit", federation.job_file, "--adapter", run / "adapter", *north, "--copies", "2")
    assert code == ExitCode.USAGE and "BAD_COMBINATION" in err


@pytest.mark.parametrize("change", ["peft.r=4", "peft.target_modules=[q_proj]", "peft={peft_type: IA3}"])
def test_an_adapter_of_another_kind_is_refused(change: str, call: Call, federation: TinyFederation) -> None:
    path = federation.folder / "for-another"
    run = path if path.exists() else federation.run("for-another").path
    options = ("--adapter", run / "adapter", "--party", federation.folder / "parties" / "north.yaml")
    code, _, err = call("audit", federation.job_file, "--set", change, *options)
    assert code == ExitCode.USAGE and "PEFT_TARGET" in err


def test_a_folder_that_is_no_run_is_refused(call: Call, tmp_path: Path) -> None:
    code, _, err = call("audit", tmp_path)
    assert code == ExitCode.USAGE and "RUN_NOT_FOUND" in err
