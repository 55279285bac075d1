"""Approvals: a job runs at a site only as a person there approved it, under the limits of then, signed by the site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import with_changes

from fedllm.errors import ConfigError, ExitCode, FedllmError, PolicyError, ResourceError, SenderRefused
from fedllm.identity.keys import new_key
from fedllm.identity.signing import Purpose, Signer, is_signed
from fedllm.job.approval import (
    Approval,
    admit,
    approvals,
    approve,
    check_approval,
    find_approval,
    limits_digest,
    withdraw,
)
from fedllm.job.job import Job
from fedllm.job.party import Party

KEY, OTHER_KEY = new_key(bits=2048), new_key(bits=2048)
VALUES: dict[str, Any] = {
    "name": "tiny",
    "parties": ["north", "east", "south"],
    "federation": {"num_rounds": 5},
    "model": {"model_name_or_path": "base"},
    "peft": {"r": 4, "target_modules": ["q_proj"]},
    "train": {"local_steps": 2, "learning_rate": 0.01},
}
PARTY: dict[str, Any] = {"name": "north", "data": {"train": "x.jsonl"}, "limits": {"max_rounds": 10}}


JOB, NORTH = Job.model_validate(VALUES), Party.model_validate(PARTY)


def verify(name: str, data: bytes, signature: bytes, *, purpose: Purpose) -> None:
    """As the roster does: north's key is KEY, and nobody else is known."""
    if name != "north":
        raise SenderRefused("NOT_ON_ROSTER", "unknown")
    if not is_signed(KEY.public_key(), data, signature, purpose=purpose):
        raise SenderRefused("BAD_SIGNATURE", "not signed")


def check(job: Job = JOB, party: Party = NORTH, *, folder: Path, project: str = "demo", **more: Any) -> Approval:
    return check_approval(job.digest, party, folder=folder, verify=more.get("verify", verify), project=project)


def approved(folder: Path, job: Job = JOB, party: Party = NORTH) -> Path:
    """Approve a job and return the file."""
    approval = approve(job, party, signer=Signer(KEY), folder=folder, project="demo")
    return folder / "approvals" / f"{approval.job_digest}.json"


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_approved_job_is_admitted(tmp_path: Path) -> None:
    path = approved(tmp_path)
    approval = check(folder=tmp_path)
    assert (approval.job_digest, approval.project, approval.party) == (JOB.digest, "demo", "north")
    assert approval.limits_digest == limits_digest(NORTH)
    assert [file.name for file in path.parent.iterdir()] == [f"{JOB.digest}.json"]
    assert admit(JOB, NORTH, folder=tmp_path, verify=verify, project="demo") == approval


def refused(**options: Any) -> str:
    with pytest.raises(PolicyError) as caught:
        check(**options)
    assert (caught.value.code, caught.value.exit_code) == ("NOT_APPROVED", ExitCode.REFUSED)
    assert "fedllm approve" in caught.value.fix
    return str(caught.value)


CHANGES = {
    "train.learning_rate": 0.02,
    "train.local_steps": 3,
    "train.optim": "sgd",
    "parties": ["north", "east", "west"],
    "federation.num_rounds": 6,
    "federation.min_parties": 3,
    "federation.weight_by": "equal",
    "peft.r": 8,
    "peft.target_modules": "all-linear",
    "model.model_name_or_path": "other",
    "model.base_digest": "ab" * 32,
    "data.max_length": 512,
    "data.chat_template_path": "other.jinja",
    "evaluate.max_new_tokens": 4,
    "seed": 1,
    "name": "other",
    "runtime.num_threads": 2,
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_job_changed_after_its_approval_is_refused(tmp_path: Path, key: str) -> None:
    approved(tmp_path)
    other = Job.model_validate(with_changes(VALUES, {key: CHANGES[key]}))
    assert other.digest in refused(job=other, folder=tmp_path)
    with pytest.raises(PolicyError, match="NOT_APPROVED"):
        admit(other, NORTH, folder=tmp_path, verify=verify, project="demo")


@pytest.mark.parametrize("key", CHANGES)
def test_the_changed_job_would_run_at_a_site_that_asks_for_no_approval(tmp_path: Path, key: str) -> None:
    careless = Party.model_validate(with_changes(PARTY, {"limits.require_approval": False}))
    other = Job.model_validate(with_changes(VALUES, {key: CHANGES[key]}))
    assert admit(other, careless, folder=tmp_path, verify=verify, project="demo") is None


def test_a_job_that_nobody_approved_is_refused(tmp_path: Path) -> None:
    assert f"not approved at `{NORTH.name}`" in refused(folder=tmp_path)


def test_an_approval_renamed_for_another_job_is_refused(tmp_path: Path) -> None:
    other = Job.model_validate(with_changes(VALUES, {"train.learning_rate": 1.0}))
    path = approved(tmp_path)
    path.rename(path.with_name(f"{other.digest}.json"))
    assert "job digest" in refused(job=other, folder=tmp_path)
    # Not even with the digest in it changed.
    rewrite(path.with_name(f"{other.digest}.json"), job_digest=other.digest)
    assert "not signed" in refused(job=other, folder=tmp_path)
    # The attack works where signatures are not looked at.
    check(job=other, folder=tmp_path, verify=lambda *args, **more: None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("approved_at", "2020-01-01T00:00:00+00:00"),
        ("job_name", "harmless"),
        ("signature", "00" * 256),
        ("signature", "00"),
    ],
)
def test_a_changed_approval_is_refused(tmp_path: Path, key: str, value: str) -> None:
    rewrite(approved(tmp_path), **{key: value})
    assert "BAD_SIGNATURE" in refused(folder=tmp_path)


def test_an_approval_signed_by_another_key_or_for_another_purpose_is_refused(tmp_path: Path) -> None:
    approve(JOB, NORTH, signer=Signer(OTHER_KEY), folder=tmp_path, project="demo")
    assert "BAD_SIGNATURE" in refused(folder=tmp_path)

    class AsMessage:
        def sign(self, data: bytes, *, purpose: Purpose) -> bytes:
            return Signer(KEY).sign(data, purpose="message")

    approve(JOB, NORTH, signer=AsMessage(), folder=tmp_path, project="demo")
    assert "BAD_SIGNATURE" in refused(folder=tmp_path)


def test_an_approval_notes_where_the_paths_of_the_job_begin(tmp_path: Path) -> None:
    path = approved(tmp_path, JOB.located(tmp_path / "jobs"))
    assert check(folder=tmp_path).base_dir == str(tmp_path / "jobs")
    rewrite(path, base_dir="/elsewhere")
    assert "BAD_SIGNATURE" in refused(folder=tmp_path)


def test_an_approval_of_another_site_or_project_is_refused(tmp_path: Path) -> None:
    south = Party.model_validate(PARTY | {"name": "south"})
    approved(tmp_path)
    assert "for the party north, not for south" in refused(party=south, folder=tmp_path)
    assert "for the project demo, not for other" in refused(folder=tmp_path, project="other")


@pytest.mark.parametrize("limits", [{"max_rounds": 9}, {"max_rounds": None}, {"max_rounds": 10, "max_upload_bytes": 9}])
def test_an_approval_falls_with_the_limits_that_it_was_given_under(tmp_path: Path, limits: dict[str, Any]) -> None:
    approved(tmp_path)
    other = Party.model_validate(PARTY | {"limits": limits})
    assert "limits have changed" in refused(party=other, folder=tmp_path)
    # Where the data are is not among the limits: a file may move.
    check(party=Party.model_validate(with_changes(PARTY, {"data.train": "y.jsonl"})), folder=tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"job_digest": 1}', "\0", "{" * 100_000])
def test_a_file_that_is_no_approval_is_refused(tmp_path: Path, text: str) -> None:
    path = approved(tmp_path)
    path.write_text(text)
    assert "no approval" in refused(folder=tmp_path)
    assert list(approvals(tmp_path)) == []


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "AB" * 32, "ab" * 31, "ab" * 32 + "\n"])
def test_what_is_no_digest_is_refused_before_any_file_is_read(tmp_path: Path, digest: str) -> None:
    with pytest.raises(PolicyError, match="NOT_APPROVED"):
        check_approval(digest, NORTH, folder=tmp_path, verify=verify, project="demo")


def test_a_job_that_the_limits_forbid_cannot_be_approved(tmp_path: Path) -> None:
    long = Job.model_validate(with_changes(VALUES, {"federation.num_rounds": 11}))
    with pytest.raises(PolicyError, match=r"POLICY_REFUSED.*max_rounds"):
        approved(tmp_path, long)
    assert list(tmp_path.iterdir()) == []
    # An approval does not stand above the limits, wherever it comes from.
    approved(tmp_path, long, Party.model_validate(PARTY | {"limits": {}}))
    with pytest.raises(PolicyError, match="POLICY_REFUSED"):
        admit(long, NORTH, folder=tmp_path, verify=verify, project="demo")


def test_a_full_disk_leaves_no_half_approval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="DISK_FULL"):
        approved(tmp_path)
    assert list((tmp_path / "approvals").iterdir()) == []


def test_approvals_are_listed_found_and_withdrawn(tmp_path: Path) -> None:
    others = [Job.model_validate(VALUES | {"seed": seed}) for seed in range(3)]
    for job in others:
        approved(tmp_path, job)
    assert [item.job_digest for item in approvals(tmp_path)] == sorted(job.digest for job in others)
    approval = find_approval(others[1].digest[:12], folder=tmp_path)
    withdraw(approval, folder=tmp_path)
    withdraw(approval, folder=tmp_path)
    assert len(list(approvals(tmp_path))) == 2
    refused(job=others[1], folder=tmp_path)


@pytest.mark.parametrize("digest", ["", "x", "ab" * 32])
def test_an_unclear_digest_is_an_error(tmp_path: Path, digest: str) -> None:
    approved(tmp_path)
    with pytest.raises(ConfigError, match="BAD_VALUE"):
        find_approval(digest, folder=tmp_path)


def test_approving_again_renews_the_approval(tmp_path: Path) -> None:
    approved(tmp_path)
    other = Party.model_validate(PARTY | {"limits": {"max_rounds": 9}})
    refused(party=other, folder=tmp_path)
    approved(tmp_path, party=other)
    check(party=other, folder=tmp_path)


def test_the_roster_verifies_what_the_signer_signs(tmp_path: Path) -> None:
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    from fedllm.identity.signing import Roster

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(KEY.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    roster = Roster({"north": builder.sign(KEY, hashes.SHA256())})
    path = approved(tmp_path)
    check(folder=tmp_path, verify=roster.verify)
    rewrite(path, job_name="other")
    with pytest.raises(FedllmError, match="NOT_APPROVED"):
        check(folder=tmp_path, verify=roster.verify)
