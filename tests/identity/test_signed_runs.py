"""Runs at a coordinator: digests signed with the server's key, checkpoints borne out by its audit log."""

import json
import shutil
from pathlib import Path

import pytest
from identities import Trial
from tiny import tiny_federation

from fedllm.runs.audit_log import AUDIT_FILE, AuditLog
from fedllm.runs.digests import DIGESTS, read_seal, seal_run
from fedllm.runs.jsonl import read_rows
from fedllm.runs.report import write_report
from fedllm.runs.verify import Verified, verify_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return tiny_federation(tmp_path_factory.mktemp("signed"), base).run().path


@pytest.fixture
def run(finished: Path, trial: Trial) -> Path:
    """A finished run at the server's site, as a coordinator has it."""
    site = trial.coordinator.site
    run = Path(shutil.copytree(finished, site / "state" / "runs" / "tiny-1"))
    identity = json.loads((run / "run.json").read_text())
    log = AuditLog.open(site / AUDIT_FILE, actor="server")
    for row in read_rows(run / "journal.jsonl"):
        if row["step"] == "commit":
            log.append("round_committed", **identity, round=row["round"], digest=row["sha256"])
    seal_run(run)
    return run


def failed(found: Verified) -> set[str]:
    return {check.name for check in found.checks if check.problems}


def test_the_server_signs_and_any_site_of_the_project_can_tell(run: Path, trial: Trial, tmp_path: Path) -> None:
    seal = read_seal(run)
    assert seal is not None and seal.signed_by == "server"
    found = verify_run(run)
    assert found.problems == [] and all(check.said for check in found.checks[:-1])
    sent = Path(shutil.copytree(run, tmp_path / "sent"))
    assert verify_run(sent, site=trial.north).problems == []
    assert "--site" in verify_run(sent).checks[1].said


def test_digests_that_were_made_again_by_someone_else_are_not_signed_by_the_server(
    run: Path, trial: Trial, tmp_path: Path
) -> None:
    sent = Path(shutil.copytree(run, tmp_path / "sent"))
    path, value = sent / "parties.json", json.loads((sent / DIGESTS).read_text())
    path.write_text("[]")
    # Alone, nothing in the run contradicts this file.
    seal_run(sent)
    assert failed(verify_run(sent)) == set()
    assert failed(verify_run(sent, site=trial.north)) == {"signature"}
    forged = json.loads((sent / DIGESTS).read_text()) | {name: value[name] for name in ("signed_by", "signature")}
    (sent / DIGESTS).write_text(json.dumps(forged))
    assert failed(verify_run(sent, site=trial.north)) == {"signature"}
    forged["signed_by"] = "nobody"
    (sent / DIGESTS).write_text(json.dumps(forged))
    assert failed(verify_run(sent, site=trial.north)) == {"signature"}


def test_pages_are_signed_again_only_where_the_signature_held(run: Path) -> None:
    write_report(run)
    assert verify_run(run).problems == []
    value = json.loads((run / DIGESTS).read_text())
    (run / "parties.json").write_text("[]")
    value["files"]["parties.json"] = "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
    (run / DIGESTS).write_text(json.dumps(value))
    write_report(run)
    assert "signature" in failed(verify_run(run))


def test_the_audit_log_bears_out_the_journal(run: Path, trial: Trial) -> None:
    path = trial.coordinator.site / AUDIT_FILE
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"round":1', b'"round":7'))
    found = verify_run(run)
    assert failed(found) == {"audit log"} and f"{path}:2" in {problem.file for problem in found.problems}
    path.write_bytes(before.splitlines(keepends=True)[0])
    assert failed(verify_run(run)) == {"audit log"}
    path.unlink()
    assert failed(verify_run(run)) == {"audit log"}


def test_a_kit_that_was_changed_proves_nothing(run: Path, trial: Trial) -> None:
    path = trial.coordinator.site / "kit" / "cert.pem"
    path.write_bytes(path.read_bytes()[:-20])
    assert "signature" in failed(verify_run(run))
