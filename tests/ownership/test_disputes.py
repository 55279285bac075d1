"""Disputes: each way to claim a model wrongly is rejected with its reason, and the rightful claim beside it holds."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from claims_made import AFTER, BEFORE, JOB, KEYS, OTHER_JOB, claim_of, folder_of, log_of, shared, signed

from fedllm.errors import ConfigError, IdentityError, StateLost
from fedllm.ownership.claims import Claim, load_claim, new_secret, save_claim
from fedllm.ownership.commitments import ClaimFolder, commit_to
from fedllm.ownership.disputes import parse_date, standing
from fedllm.ownership.keys import fingerprint, open_key, public_hex
from fedllm.ownership.log import OwnershipLog, check_log, commitment_entry, read_log
from fedllm.ownership.merkle import is_consistent, is_included
from fedllm.ownership.statistics import p_value
from fedllm.ownership.verify import Reading, judge


def reasons(claim: Claim, log: OwnershipLog, **known: object) -> str:
    """Return why a log does not bear a claim out; empty where it does."""
    check_log(log, where=Path("log"))
    return "; ".join(standing(claim, log, **known).reasons)  # type: ignore[arg-type]


def test_a_claim_that_was_committed_to_stands_and_its_place_is_proved() -> None:
    claim = claim_of()
    found = standing(claim, log_of(claim_of("east"), claim))
    assert found.reasons == () and found.place is not None
    place = found.place
    assert (place.time, place.signers, place.index) == (BEFORE, ("east", "north"), 3)
    hashes = [bytes.fromhex(step) for step in place.inclusion]
    top, newest = bytes.fromhex(place.root), bytes.fromhex(place.newest_root)
    assert is_included(bytes.fromhex(place.leaf), place.index, size=place.size, proof=hashes, expected=top)
    steps = [bytes.fromhex(step) for step in place.consistency]
    assert is_consistent((place.size, top), (place.newest_size, newest), steps)


def test_a_late_commitment_is_rejected() -> None:
    claim = claim_of("east")
    assert "came late" in reasons(claim, log_of(claim_of(), late=[claim]))
    assert reasons(claim, log_of(claim_of(), claim)) == ""


def test_a_commitment_after_the_suspect_was_seen_is_rejected() -> None:
    claim = claim_of()
    log = log_of(claim)
    assert "was seen on" in reasons(claim, log, seen=parse_date("2026-02-28"))
    assert reasons(claim, log, seen=parse_date("2026-03-02")) == ""


@pytest.mark.parametrize("field", ["salt", "key_seed", "bits", "threshold"])
def test_a_changed_claim_does_not_open_its_commitment(field: str) -> None:
    claim = claim_of()
    value: object = new_secret()
    if field == "bits":
        value = claim.bits[:-1] + ("0" if claim.bits[-1] == "1" else "1")
    if field == "threshold":
        value = 0.01
    assert "not those that were committed to" in reasons(claim.model_copy(update={field: value}), log_of(claim))


def test_a_commitment_of_another_job_is_rejected_in_both_logs() -> None:
    claim = claim_of(job=OTHER_JOB)
    assert "none on another's" in reasons(claim, log_of(claim_of()))
    assert "replayed" in reasons(claim, log_of(claim))
    assert reasons(claim, log_of(claim, job=OTHER_JOB)) == ""


def test_the_same_claim_renamed_to_another_job_is_no_longer_the_one_committed_to() -> None:
    claim = claim_of(job=OTHER_JOB)
    renamed = claim.model_copy(update={"job_digest": JOB})
    assert "not those that were committed to" in reasons(renamed, log_of(claim))


def test_a_key_that_was_chosen_after_the_model_fits_it_and_proves_nothing() -> None:
    """The ambiguity attack: bits are read off a model under any key. Without commitments it succeeds."""
    values = torch.randn(32, generator=torch.Generator().manual_seed(1))
    forged = claim_of("thief", bits="".join("1" if value > 0 else "0" for value in values))
    matches = int((values * torch.tensor(forged.signs()) > 0).sum())
    reading = Reading("product", "as it is", matches, 32, p_value(matches, 32))
    assert reading.p < 1e-6
    (verdict,) = judge([forged], [standing(forged, log_of(claim_of()))], lambda claim: [reading])
    assert verdict.status == "rejected" and "fits any model" in verdict.sentence
    (alone,) = judge([forged], [None], lambda claim: [reading])
    assert alone.status == "rejected" and "no log is given" in alone.sentence


def test_two_claimants_of_one_log_share_a_model() -> None:
    claims = [claim_of(), claim_of("east")]
    log, reading = log_of(*claims), Reading("product", "as it is", 32, 32, p_value(32, 32))
    found = judge(claims, [standing(claim, log) for claim in claims], lambda claim: [reading])
    assert all(verdict.upheld for verdict in found)


@pytest.mark.parametrize("change", ["removed", "reordered", "replaced", "cut"])
def test_a_log_that_was_changed_is_broken(change: str, tmp_path: Path) -> None:
    claim, other = claim_of(), claim_of("east")
    log = log_of(claim, other)
    check_log(log, where=tmp_path)
    entries = list(log.entries)
    if change == "removed":
        del entries[3]
    if change == "reordered":
        entries[2], entries[3] = entries[3], entries[2]
    if change == "replaced":
        entries[2] = commitment_entry(commit_to(claim_of(), KEYS["north"]))
    if change == "cut":
        entries = entries[:3]
    changed = read_log(folder_of(OwnershipLog(tuple(entries), log.heads), tmp_path))
    with pytest.raises(StateLost, match="changed, taken out or moved"):
        check_log(changed, where=tmp_path)


def test_a_forged_signature_and_a_head_of_another_run_are_found(tmp_path: Path) -> None:
    log = log_of(claim_of())
    head = log.heads[0]
    forged = head.model_copy(update={"signatures": head.signatures | {"east": "0" * 128}})
    with pytest.raises(StateLost, match="not signed by the key of `east`"):
        check_log(OwnershipLog(log.entries, (forged,)), where=tmp_path)
    with pytest.raises(StateLost, match="another run"):
        check_log(signed(log, 1, AFTER, by=["north"], job=OTHER_JOB), where=tmp_path)
    with pytest.raises(StateLost, match="does not follow"):
        check_log(signed(log, 1, BEFORE, by=["north"]), where=tmp_path)
    with pytest.raises(StateLost, match="no head"):
        check_log(OwnershipLog(log.entries), where=tmp_path)


def test_a_late_commitment_does_not_pass_for_an_early_one_by_taking_heads_away(tmp_path: Path) -> None:
    late = claim_of("east")
    log = log_of(claim_of(), late=[late])
    with pytest.raises(StateLost, match="head from before round 0 is missing"):
        check_log(OwnershipLog(log.entries, log.heads[1:]), where=tmp_path)


def test_a_log_that_not_all_signed_or_with_another_key_proves_nothing() -> None:
    claim = claim_of()
    log = log_of(claim)
    lonely = signed(
        shared(signed(OwnershipLog(log.entries[:3]), 0, BEFORE, by=["north"]), by=["north"]), 0, BEFORE, by=[]
    )
    assert "not signed by east" in reasons(claim, lonely)
    known = {"east": fingerprint(public_hex(KEYS["thief"]))}
    assert "log's key of `east`" in reasons(claim, log, keys=known)
    assert reasons(claim, log, keys={"east": fingerprint(public_hex(KEYS["east"]))}) == ""
    assert "none of the parties whose keys are known" in reasons(claim, log, keys={"south": known["east"]})


def test_a_line_that_no_log_has_is_refused(tmp_path: Path) -> None:
    folder = folder_of(log_of(claim_of()), tmp_path)
    (folder / "log.jsonl").write_text('{"kind":"other"}\n', encoding="utf-8")
    with pytest.raises(StateLost, match="is not one"):
        read_log(folder)


def test_a_claim_is_its_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    path, claim = tmp_path / "claim.json", claim_of()
    save_claim(claim, path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_claim(path) == claim
    assert claim.key_seed not in repr(claim) and claim.bits not in repr(claim)
    with pytest.raises(IdentityError, match="KEY_EXISTS"):
        save_claim(claim_of(), path)
    path.chmod(0o644)
    with pytest.raises(IdentityError, match="KEY_EXPOSED"):
        load_claim(path)


def test_a_broken_claim_is_refused_without_quoting_it(tmp_path: Path) -> None:
    path, claim = tmp_path / "claim.json", claim_of()
    save_claim(claim, path)
    path.write_text(path.read_text(encoding="utf-8").replace(claim.salt, "short"), encoding="utf-8")
    with pytest.raises(ConfigError, match="no claim: salt") as raised:
        load_claim(path)
    assert claim.key_seed not in str(raised.value)


def test_a_commitment_that_is_not_to_the_claim_beside_it_is_refused(tmp_path: Path) -> None:
    folder = ClaimFolder(tmp_path / "own")
    claim = claim_of()
    made = folder.write(claim)
    assert folder.commitment(JOB) == made and made.is_sound()
    assert public_hex(open_key(folder.root)) == made.public_key
    other = commit_to(claim_of(), folder.key())
    folder.commitment_file(JOB).write_text(other.model_dump_json(), encoding="utf-8")
    with pytest.raises(IdentityError, match="not to the claim beside it"):
        folder.commitment(JOB)


def test_a_time_stamp_is_on_this_commitment_or_refused(tmp_path: Path) -> None:
    folder, claim = ClaimFolder(tmp_path / "own"), claim_of()
    folder.write(claim)
    stamp = tmp_path / "answer.tsr"
    stamp.write_bytes(b"0\x82 of something else " + bytes(32))
    with pytest.raises(ConfigError, match="not a time stamp on this commitment"):
        folder.attach(JOB, stamp)
    stamp.write_bytes(b"0\x82" + bytes.fromhex(claim.commitment()) + b" signed")
    stamped = folder.attach(JOB, stamp)
    assert stamped.is_sound() and folder.commitment(JOB).stamp == stamped.stamp != ""


def test_a_date_is_read_as_utc() -> None:
    assert parse_date("2026-03-02") == datetime(2026, 3, 2, tzinfo=UTC)
    with pytest.raises(ConfigError, match="is no date"):
        parse_date("yesterday")
