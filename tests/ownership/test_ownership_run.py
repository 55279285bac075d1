"""Marks through real runs: with and without secure sums, read back, resumed, and what the log refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import TinyFederation, thorough, tiny_federation

from fedllm.errors import ConfigError, FedllmError, RunFailed
from fedllm.ownership.claims import load_claim, new_secret
from fedllm.ownership.commitments import ClaimFolder
from fedllm.ownership.log import FOLDER, OwnershipLog, check_log, read_log
from fedllm.runtime.claims_told import claims_told
from fedllm.runtime.export import export
from fedllm.runtime.ownership import Evidence, commit, verify
from fedllm.runtime.plan import make_plan
from fedllm.runtime.run import RunResult, Watch, resume
from fedllm.runtime.validate import validate

FOUR = {"north": 6, "east": 9, "south": 4, "west": 5}
JOB: dict[str, Any] = {
    "federation.num_rounds": 6,
    "federation.keep": "last",
    "federation.eval_every": 0,
    "train.local_steps": 4,
    "peft.r": 4,
    "peft.target_modules": "all-linear",
    "ownership.carrier": "product",
    "ownership.claimants": list(FOUR),
}
TWO = {"north": 6, "south": 4}
SHORT = JOB | {"federation.num_rounds": 2, "train.local_steps": 2, "ownership.claimants": ["north"]}
SUMS = {"privacy.secure_aggregation.enabled": True, "federation.weight_by": "equal"}
NOISE = {"privacy.differential_privacy": {"unit": "example", "noise_multiplier": 1.0, "accountant": "RDP"}}


def committed(
    folder: Path, base: Path, sizes: dict[str, int], job: dict[str, Any]
) -> tuple[TinyFederation, list[Path]]:
    """Return a job whose claimants have committed, and their claims."""
    federation = tiny_federation(folder, base, sizes=sizes, job=job)
    return federation, [path for path, _ in commit(federation.job(), federation.parties())]


def broken_off(federation: TinyFederation, name: str = "run") -> Path:
    """Return the folder of a run that was interrupted after round 1."""

    def stop(number: int, rows: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.run(name, watch=Watch(on_round=stop))
    return federation.folder / name


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[TinyFederation, list[Path], RunResult]:
    """A finished run with four claimants."""
    federation, claims = committed(tmp_path_factory.mktemp("marked"), base, FOUR, JOB)
    return federation, claims, federation.run()


def test_every_claimant_is_read_back_from_adapter_and_merged_weights(marked: Any, base: Path, tmp_path: Path) -> None:
    _, claims, run = marked
    whole = export(run.path, tmp_path / "whole", merge=True)
    for suspect, tries in ((run.path, 4), (run.adapter, 4), (whole, 8)):
        verdicts = verify(suspect, Evidence(claims, [run.path], base=base))
        assert [verdict.status for verdict in verdicts] == ["upheld"] * 4
        assert all(verdict.p < 1e-6 and verdict.tries == tries for verdict in verdicts)


def test_nobody_finds_a_mark_in_an_unmarked_sibling(marked: Any, base: Path, tmp_path: Path) -> None:
    _, claims, run = marked
    sibling = tiny_federation(tmp_path, base, sizes=FOUR, job=JOB | {"ownership": None}).run()
    verdicts = verify(sibling.path, Evidence(claims, [run.path]))
    assert [verdict.status for verdict in verdicts] == ["not shown"] * 4


@pytest.mark.parametrize(
    "protection", [SUMS, pytest.param(NOISE, marks=thorough)], ids=["secure sum", "private training"]
)
def test_marks_go_through_what_protects_training(protection: dict[str, Any], tmp_path: Path, base: Path) -> None:
    sizes = FOUR if protection is SUMS else TWO
    changes = protection | {"federation.num_rounds": 4, "ownership.claimants": list(sizes)}
    federation, claims = committed(tmp_path, base, sizes, JOB | changes)
    run = federation.run().path
    assert all(verdict.upheld and verdict.p < 1e-6 for verdict in verify(run, Evidence(claims, [run])))


def test_every_party_has_the_log_that_all_signed(marked: Any) -> None:
    _, _, run = marked
    server = read_log(run.path / FOLDER)
    check_log(server, where=run.path)
    # Two heads before round 0, without the parties' shares and with them, then one a round, round 0 among them.
    assert [signed.head.round for signed in server.heads] == [0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert all(set(signed.signatures) == set(FOUR) for signed in server.heads)
    for party in FOUR:
        copy = read_log(run.path / "parties" / party / FOLDER)
        check_log(copy, where=run.path)
        assert copy.entries == server.entries and copy.heads[:-1] == server.heads[:-1]


def test_any_copy_of_the_log_is_evidence(marked: Any) -> None:
    _, claims, run = marked
    copy = run.path / "parties" / "west" / FOLDER
    assert verify(run.path, Evidence(claims[:1], [copy]))[0].upheld


def test_nothing_secret_is_in_the_run_folder(marked: Any) -> None:
    _, claims, run = marked
    secrets = [value.encode() for path in claims for value in (load_claim(path).key_seed, load_claim(path).salt)]
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files for secret in secrets if secret in path.read_bytes()] == []


def test_report_and_card_say_who_claims_the_model(marked: Any) -> None:
    _, _, run = marked
    root = read_log(run.path / FOLDER).heads[-1].head.root
    page, card = ((run.path / name).read_text(encoding="utf-8") for name in ("report.html", "adapter/README.md"))
    assert "Commitment of west" in page and root in page
    assert "carries secret marks" in card and root in card and "west" not in card


def test_a_run_that_broke_off_ends_with_the_same_bits_and_one_log(tmp_path: Path, base: Path) -> None:
    federation, claims = committed(tmp_path, base, TWO, SHORT)
    whole, broken = federation.run("whole"), resume(broken_off(federation, "broken"))
    assert broken.adapter_sha256 == whole.adapter_sha256
    log = read_log(broken.path / FOLDER)
    check_log(log, where=broken.path)
    assert len(log.commitments()) == 1 and log.heads[-1].head.round == 2
    assert standing_of(broken.path, claims)


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, False),
        ({"ownership.num_triggers": 4}, False),
        (NOISE, False),
        (NOISE | {"ownership.num_triggers": 4}, True),
        ({"privacy.differential_privacy": {"unit": "party", "noise_multiplier": 1.0}}, True),
    ],
    ids=["bits", "triggers", "bits, private", "triggers, private", "hidden parties"],
)
def test_the_plan_warns_where_noise_may_take_the_marks(
    changes: dict[str, Any], warned: bool, tmp_path: Path, base: Path
) -> None:
    federation = tiny_federation(tmp_path, base, sizes=TWO, job=SHORT | {"data.max_length": 128} | changes)
    told = claims_told(federation.job(), federation.parties()[0])
    assert any("W24" in line for line in told) == warned
    assert any("secret prompts" in line for line in told) == ("ownership.num_triggers" in changes)


def standing_of(run: Path, claims: list[Path]) -> bool:
    """Return whether a log bears all claims out, whatever the model shows."""
    return not any(verdict.reasons for verdict in verify(run, Evidence(claims, [run])))


def test_a_claimant_without_a_commitment_does_not_start(tmp_path: Path, base: Path) -> None:
    federation = tiny_federation(tmp_path, base, sizes=TWO, job=SHORT)
    with pytest.raises(ConfigError, match="OWNERSHIP_UNCOMMITTED"):
        federation.run()
    assert not (tmp_path / "run").exists()
    job, parties = federation.job(), federation.parties()
    assert "north has NOT committed" in make_plan(job, parties, validate(job, parties)).ownership
    commit(job, parties)
    assert "north has committed" in make_plan(job, parties, validate(job, parties)).ownership
    with pytest.raises(FedllmError, match="KEY_EXISTS"):
        commit(job, parties)


@pytest.mark.parametrize("change", ["removed", "rewritten"])
def test_parties_sign_no_log_that_the_server_changed(change: str, tmp_path: Path, base: Path) -> None:
    federation, _ = committed(tmp_path, base, TWO, SHORT)
    folder = broken_off(federation) / FOLDER
    log = read_log(folder)
    entries = list(log.entries)
    if change == "removed":
        entries = [entry for entry in entries if '"kind":"commitment"' not in entry]
    else:
        entries = [entry.replace('"round":0', '"round":7') for entry in entries]
    assert entries != list(log.entries)
    # As a server would that wants it to go unseen: heads that nobody signed tell parties that they begin anew.
    OwnershipLog(tuple(entries), tuple(head.model_copy(update={"signatures": {}}) for head in log.heads)).write(folder)
    with pytest.raises(RunFailed, match="OWNERSHIP_BROKEN"):
        resume(tmp_path / "run")


def test_a_changed_claim_stops_the_run(tmp_path: Path, base: Path) -> None:
    federation, (path,) = committed(tmp_path, base, TWO, SHORT)
    claim = load_claim(path).model_copy(update={"key_seed": new_secret()})
    path.write_text(json.dumps(claim.model_dump(mode="json")), encoding="utf-8")
    with pytest.raises(FedllmError, match="not to the claim beside it"):
        federation.run()


def test_bits_that_do_not_fit_are_refused(tmp_path: Path, base: Path) -> None:
    changes = {"ownership.num_bits": 1024, "peft.r": 1, "peft.target_modules": ["v_proj"]}
    federation = tiny_federation(tmp_path, base, sizes=TWO, job=SHORT | changes)
    with pytest.raises(ConfigError, match=r"1024 bits of 1 claimants do not fit into \d+ numbers \(E22\)"):
        validate(federation.job(), federation.parties())
    with pytest.raises(ConfigError, match="E22"):
        commit(federation.job(), federation.parties())


def test_a_carrier_that_is_frozen_is_refused(tmp_path: Path, base: Path) -> None:
    federation = tiny_federation(tmp_path, base, sizes=TWO, job=SHORT | {"ownership.carrier": "norms"})
    with pytest.raises(ConfigError, match="nothing that is trained is a carrier"):
        commit(federation.job(), federation.parties())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"ownership.claimants": ["nobody"]}, "no party of the job"),
        ({"federation.lora_rule": "FedSA-LoRA"}, "no product is shared"),
        ({"federation.lora_rule": "FLoRA", "train.optimizer_state": "reset"}, "fresh factors"),
        ({"federation.lora_rule": "FedEx-LoRA"}, "added to the base"),
        ({"peft.use_dora": True}, "DoRA scales the product"),
        ({"federation.ranks": {"north": 2}}, "lower rank"),
        ({"federation.strategy": {"name": "SCAFFOLD"}, "train.optim": "sgd"}, "control variates"),
        ({"federation.robust": {"name": "MultiKrum", "num_malicious": 1}}, "one party alone pushes"),
        ({"peft": {"peft_type": "LN_TUNING"}}, "has no product"),
        ({"scenario": "FedOST", "federation.owner": "south"}, "the owner's whole"),
    ],
)
def test_what_would_lose_a_mark_is_refused(changes: dict[str, Any], what: str, tmp_path: Path, base: Path) -> None:
    from fedllm.job.check import check_job

    federation = tiny_federation(tmp_path, base, sizes=TWO, job=SHORT | changes)
    with pytest.raises(ConfigError) as raised:
        check_job(federation.job(), federation.parties())
    assert what in " ".join(error.what for error in (raised.value, *raised.value.also))


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"carrier": "product"}, "marks nothing"),
        ({"claimants": ["north"]}, "claim nothing"),
        ({"num_bits": 64}, "has no effect"),
        ({"carrier": "product", "claimants": ["north", "north"]}, "named twice"),
    ],
)
def test_settings_without_effect_are_refused(section: dict[str, Any], what: str, tmp_path: Path, base: Path) -> None:
    federation = tiny_federation(tmp_path, base, sizes=TWO, job={"ownership": section})
    with pytest.raises(ConfigError, match=what):
        federation.job()


def test_rules_that_keep_the_product_keep_the_mark(tmp_path: Path, base: Path) -> None:
    for rule in ("FFA-LoRA", "RoLoRA", "FlexLoRA"):
        changes = {"federation.lora_rule": rule, "train.optimizer_state": "reset", "federation.num_rounds": 4}
        federation, claims = committed(tmp_path / rule, base, TWO, SHORT | changes)
        run = federation.run().path
        assert verify(run, Evidence(claims, [run]))[0].p < 1e-6, rule


def test_a_party_keeps_its_claims_where_its_file_says(tmp_path: Path, base: Path) -> None:
    federation = tiny_federation(tmp_path, base, sizes=TWO, job=SHORT, party={"ownership.folder": "../vault"})
    ((path, _),) = commit(federation.job(), federation.parties())
    assert path.parent == tmp_path / "vault"
    assert ClaimFolder(path.parent).commitment(federation.job().digest).party == "north"
