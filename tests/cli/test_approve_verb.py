"""`fedllm approve`: what a person at a site is shown, and that only a yes signs it."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import TinyFederation, tiny_federation, with_changes, write_yaml
from verbs import Call

from fedllm.cli.plan import size
from fedllm.errors import ExitCode
from fedllm.identity.kit import open_kit
from fedllm.job.approval import admit
from fedllm.job.job import Job
from fedllm.job.loading import load_model
from fedllm.job.party import Party
from fedllm.job.project import Project, ServerAddress
from fedllm.runs.audit_log import read_log
from fedllm.runs.audit_verify import verify_log
from fedllm.runs.jsonl import read_rows
from fedllm.runtime.provision import provision_all


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site folder of north, with key and kit; keys take time to make, so there is one."""
    folder = tmp_path_factory.mktemp("project")
    project = Project(name="demo", server=ServerAddress(host="127.0.0.1", port=8002), parties=["north"])
    provision_all(folder / "coordinator", project, {"north": folder / "site-north"})
    return folder / "site-north"


@pytest.fixture
def federation(tmp_path: Path, base: Path, identities: Path) -> TinyFederation:
    """A job, and north with its own data and identity; the files of the other parties are elsewhere."""
    made = tiny_federation(tmp_path, base)
    shutil.copytree(identities, tmp_path / "parties" / "site-north")
    for other in ("east", "south"):
        (tmp_path / "parties" / f"{other}.yaml").unlink()
        (tmp_path / "data" / f"{other}.jsonl").unlink()
    return made


@pytest.fixture
def party(federation: TinyFederation) -> Path:
    return federation.folder / "parties" / "north.yaml"


def site_of(party: Path) -> Path:
    return party.parent / "site-north"


def approvals_of(party: Path) -> list[str]:
    return sorted(path.stem for path in (site_of(party) / "approvals").glob("*"))


def events_of(party: Path) -> list[tuple[str, str | None, str | None]]:
    assert verify_log(site_of(party) / "audit.jsonl") == []
    entries = [entry for _, _, entry in read_log(site_of(party) / "audit.jsonl") if entry]
    return [(entry.event, entry.job_digest, entry.code) for entry in entries]


def change(file: Path, **changes: Any) -> None:
    from fedllm.job.yaml_file import read_yaml

    write_yaml(file, with_changes(read_yaml(file).values, changes))


def with_terminal(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self, *args: Any) -> str:
            return answer + "\n"

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda *args: answer)


def test_a_yes_signs_what_was_shown(call: Call, federation: TinyFederation, party: Path) -> None:
    job = federation.job()
    code, out, err = call("approve", federation.job_file, "--party", party, "--yes")
    assert (code, err) == (0, "")
    shown = [
        job.digest,
        "north, east, south; server 127.0.0.1:8002; project demo",
        "448 parameters",
        "peft_type LORA",
        "target_modules [q_proj, v_proj]",
        str(federation.folder / "data" / "north.jsonl"),
        "training: 6 examples",
        str(federation.folder / "data" / "north-eval.jsonl"),
        "held-out: 3 examples",
        "2 rounds of 2 steps",
        "none: the job gives no differential privacy",
        "SendInitial, Train, Evaluate",
        *job.table_line().who_learns_what(job.federation, job.privacy),
        "holds  max_rounds: asked 2 rounds; allowed any number",
    ]
    assert [words for words in shown if words not in out] == []
    assert approvals_of(party) == [job.digest]
    assert events_of(party) == [("job_approved", job.digest, None)]


def test_the_runtime_admits_what_was_approved_and_nothing_else(
    call: Call, federation: TinyFederation, party: Path
) -> None:
    assert call("approve", federation.job_file, "--party", party, "--yes")[0] == 0
    kit = open_kit(site_of(party))
    own, _ = load_model(Party, party, overrides=[])

    def try_it(job: Job) -> Any:
        return admit(job, own, folder=kit.site, verify=kit.roster.verify, project=kit.project)

    assert try_it(federation.job())
    with pytest.raises(Exception, match="NOT_APPROVED"):
        try_it(Job.from_yaml(federation.job_file, overrides=["train.learning_rate=0.5"]))


@pytest.mark.parametrize("answer", ["", "n", "no"])
def test_the_default_answer_is_no(
    call: Call, federation: TinyFederation, party: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    with_terminal(monkeypatch, answer)
    code, out, _ = call("approve", federation.job_file, "--party", party)
    assert (code, out.split()[-2:]) == (ExitCode.REFUSED, ["not", "approved"])
    assert approvals_of(party) == []
    assert not (site_of(party) / "audit.jsonl").exists()


def test_a_yes_at_the_terminal_approves(
    call: Call, federation: TinyFederation, party: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_terminal(monkeypatch, "y")
    code, _, err = call("approve", federation.job_file, "--party", party)
    assert code == 0
    assert "Approve this job for north?" in err
    assert approvals_of(party) == [federation.job().digest]


def test_without_a_terminal_nothing_is_signed_unasked(
    call: Call, federation: TinyFederation, party: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code, out, err = call("approve", federation.job_file, "--party", party)
    assert code == ExitCode.USAGE
    assert "limits of this site" in out and "--yes" in err
    code, out, _ = call("approve", federation.job_file, "--party", party, "--json")
    assert (code, json.loads(out)["data"]["approval"]) == (0, None)
    assert approvals_of(party) == []


def test_json_has_all_that_is_shown(call: Call, federation: TinyFederation, party: Path) -> None:
    code, out, _ = call("approve", federation.job_file, "--party", party, "--yes", "--json")
    data = json.loads(out)["data"]
    assert code == 0
    assert data["approval"]["job_digest"] == data["job_digest"] == federation.job().digest
    assert (data["num_rounds"], data["steps_per_round"], data["epsilon"]) == (2, 2, None)
    assert [(read["use"], read["examples"]) for read in data["data"]] == [("training", 6), ("held-out", 3)]
    assert all(rule["holds"] for rule in data["limits"])


def test_the_bytes_foretold_bound_those_of_the_run(call: Call, tmp_path: Path, base: Path, identities: Path) -> None:
    whole = tiny_federation(tmp_path / "whole", base)
    site = whole.folder / "parties" / "site-north"
    shutil.copytree(identities, site)
    code, out, _ = call("approve", whole.job_file, "--party", site.parent / "north.yaml", "--json")
    data = json.loads(out)["data"]
    rows = [row for row in read_rows(whole.run().path / "metrics.jsonl") if row["party"] == "north"]
    sent = {row["round"]: row["value"] for row in rows if row["name"] == "bytes_up"}
    assert code == 0
    assert max(sent.values()) == pytest.approx(data["bytes_up_per_round"], rel=0.02)
    assert sum(sent.values()) == pytest.approx(data["bytes_up_in_all"], rel=0.02)


def test_a_broken_limit_is_told_noted_and_not_signed(call: Call, federation: TinyFederation, party: Path) -> None:
    change(party, **{"limits.max_rounds": 1, "limits.min_parties": 5})
    code, _, err = call("approve", federation.job_file, "--party", party, "--yes")
    assert code == ExitCode.REFUSED
    assert "max_rounds" in err and "3 parties" in err
    assert approvals_of(party) == []
    assert events_of(party) == [("job_refused", federation.job().digest, "POLICY_REFUSED")]


@pytest.mark.parametrize("key", ["max_upload_bytes_per_round", "max_upload_bytes"])
def test_bytes_beyond_a_limit_are_refused_as_they_are_encoded(
    call: Call, federation: TinyFederation, party: Path, key: str
) -> None:
    _, out, _ = call("approve", federation.job_file, "--party", party, "--json")
    name = {"max_upload_bytes_per_round": "bytes_up_per_round", "max_upload_bytes": "bytes_up_in_all"}[key]
    foretold = json.loads(out)["data"][name]
    # The tensors alone would fit: headers and the first adapter count too.
    change(party, **{f"limits.{key}": foretold - 1})
    code, _, err = call("approve", federation.job_file, "--party", party, "--yes")
    assert (code, key in err) == (ExitCode.REFUSED, True)
    change(party, **{f"limits.{key}": foretold})
    assert call("approve", federation.job_file, "--party", party, "--yes")[0] == 0


def test_a_refused_operation_is_shown(call: Call, federation: TinyFederation, party: Path) -> None:
    change(party, **{"limits.allowed_operations": ["Train", "SendInitial"]})
    code, out, _ = call("approve", federation.job_file, "--party", party, "--yes")
    assert code == 0
    assert "answers    SendInitial, Train\n" in out and "refuses    Evaluate\n" in out


def test_approvals_are_listed_with_why_they_do_not_hold(call: Call, federation: TinyFederation, party: Path) -> None:
    assert "no job is approved" in call("approve", "--list", "--party", party)[1]
    digest = federation.job().digest
    call("approve", federation.job_file, "--party", party, "--yes")
    code, out, _ = call("approve", "--list", "--party", party)
    assert code == 0
    assert digest in out and "tiny" in out and "does not hold" not in out
    change(party, **{"limits.max_rounds": 9})
    _, out, _ = call("approve", "--list", "--party", party)
    assert "does not hold: the site's limits have changed" in out
    (item,) = json.loads(call("approve", "--list", "--party", party, "--json")[1])["data"]
    assert (item["job_digest"], item["holds"]) == (digest, False)


def test_an_approval_is_withdrawn_by_the_beginning_of_its_digest(
    call: Call, federation: TinyFederation, party: Path
) -> None:
    digest = federation.job().digest
    call("approve", federation.job_file, "--party", party, "--yes")
    code, out, _ = call("approve", "--withdraw", digest[:10], "--party", party)
    assert code == 0
    assert digest in out
    assert approvals_of(party) == []
    assert [event for event, _, _ in events_of(party)] == ["job_approved", "approval_withdrawn"]
    assert call("approve", "--withdraw", digest[:10], "--party", party)[0] == ExitCode.USAGE


def test_without_a_log_there_is_no_approval(call: Call, federation: TinyFederation, party: Path) -> None:
    log = site_of(party) / "audit.jsonl"
    call("approve", federation.job_file, "--party", party, "--yes")
    call("approve", "--withdraw", federation.job().digest, "--party", party)
    log.write_bytes(log.read_bytes().replace(b"job_approved", b"kit_opened  "))
    code, _, err = call("approve", federation.job_file, "--party", party, "--yes")
    assert code == ExitCode.STATE_LOST
    assert "AUDIT_BROKEN" in err
    assert approvals_of(party) == []


def test_a_full_disk_keeps_the_job_unapproved(
    call: Call, federation: TinyFederation, party: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        code, _, err = call("approve", federation.job_file, "--party", party, "--yes")
    assert (code, "DISK_FULL" in err) == (ExitCode.RESOURCES, True)
    assert approvals_of(party) == []
    assert (site_of(party) / "audit.jsonl").read_bytes() == b""


def test_a_site_that_the_job_does_not_name_is_told(call: Call, federation: TinyFederation, party: Path) -> None:
    change(federation.job_file, parties=["west", "east", "south"])
    code, _, err = call("approve", federation.job_file, "--party", party, "--yes")
    assert (code, "PARTY_UNKNOWN" in err) == (ExitCode.USAGE, True)


def test_a_site_without_a_kit_or_with_a_damaged_one_signs_nothing(
    call: Call, federation: TinyFederation, party: Path
) -> None:
    manifest = site_of(party) / "kit" / "kit.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"demo", b"dema"))
    code, _, err = call("approve", federation.job_file, "--party", party, "--yes")
    assert (code, "KIT_DAMAGED" in err) == (ExitCode.IDENTITY, True)
    shutil.rmtree(site_of(party))
    code, _, err = call("approve", federation.job_file, "--party", party, "--yes")
    assert (code, "KIT_MISSING" in err) == (ExitCode.IDENTITY, True)
    assert not site_of(party).exists()


def test_the_kit_of_another_party_signs_nothing(call: Call, federation: TinyFederation, party: Path) -> None:
    other = party.with_name("east.yaml")
    shutil.copy(party, other)
    change(other, name="east")
    site_of(party).rename(party.parent / "site-east")
    code, _, err = call("approve", federation.job_file, "--party", other, "--yes")
    assert (code, "that of `north`" in err) == (ExitCode.USAGE, True)


@pytest.mark.parametrize("words", [[], ["--list", "--withdraw", "ab"], ["job.yaml", "--list"]])
def test_one_thing_at_a_time(call: Call, party: Path, words: list[str]) -> None:
    code, _, err = call("approve", *words, "--party", party)
    assert (code, "BAD_COMBINATION" in err) == (ExitCode.USAGE, True)


def test_sizes_are_shown_as_plan_shows_them(call: Call, federation: TinyFederation, party: Path) -> None:
    data = json.loads(call("approve", federation.job_file, "--party", party, "--json")[1])["data"]
    out = call("approve", federation.job_file, "--party", party, "--yes")[1]
    up = f"at most {size(data['bytes_up_per_round'])} in a round, {size(data['bytes_up_in_all'])} in all"
    assert up in out


OWNERSHIP = {"carrier": "product", "num_triggers": 4, "claimants": ["north", "east"], "trace": "delivered"}
PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "accountant": "RDP"}


def test_claims_secret_answers_and_copies_are_told(call: Call, federation: TinyFederation, party: Path) -> None:
    changes = {"ownership": OWNERSHIP, "data.max_length": 128, "peft.r": 4, "peft.target_modules": "all-linear"}
    change(federation.job_file, **changes, **{"privacy.differential_privacy": PRIVATE})
    code, out, err = call("approve", federation.job_file, "--party", party, "--yes")
    assert (code, err) == (0, "")
    shown = [
        "north, east claim the model that comes out: 32 secret bits each, in the product of LoRA's factors and 4 "
        "secret prompts each, to which the model will give secret answers",
        f"with the key in {party.parent / 'ownership-north'}",
        "this site is a claimant",
        "this site has NOT committed",
        "can tell from a leaked one that it was this site's",
        "WARNING: the noise of private training may keep the secret answers from being learnt",
        "(W24)",
    ]
    assert [words for words in shown if words not in out] == []
    assert call("ownership", "commit", federation.job_file, "--party", party)[0] == 0
    data = json.loads(call("approve", federation.job_file, "--party", party, "--json")[1])["data"]
    assert "this site has committed" in data["ownership"]


def test_who_claims_nothing_is_told_of_the_others_marks(call: Call, federation: TinyFederation, party: Path) -> None:
    others = {"carrier": "product", "num_triggers": 4, "claimants": ["east"]}
    changes = {"ownership": others, "data.max_length": 128, "peft.r": 4, "peft.target_modules": "all-linear"}
    change(federation.job_file, **changes)
    out = call("approve", federation.job_file, "--party", party, "--yes")[1]
    assert "this site claims nothing" in out and "answers that others chose by lot" in out
    assert "is a claimant" not in out and "committed\n" not in out and "leaked" not in out and "W24" not in out
    change(federation.job_file, ownership=None)
    assert "claims and copies" not in call("approve", federation.job_file, "--party", party, "--yes")[1]
