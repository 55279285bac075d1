"""Forgeries: claims that were made when the model was known, each beside the rightful claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from claims_made import AFTER, BEFORE, KEYS, claim_of, folder_of, log_of, signed
from safetensors.torch import save_file

from fedllm.errors import ConfigError
from fedllm.ownership.claims import Claim, MarkSite, new_bits, new_secret, save_claim
from fedllm.ownership.commitments import commit_to
from fedllm.ownership.directions import directed, share_of
from fedllm.ownership.disputes import Standing, standing
from fedllm.ownership.keys import fingerprint, public_hex
from fedllm.ownership.log import OwnershipLog, check_log, commitment_entry, party_entry, share_entry
from fedllm.ownership.statistics import p_value
from fedllm.ownership.suspect import Suspect, open_suspect
from fedllm.ownership.verify import READINGS, Reading, Verdict, judge, mark_values, read_marks
from fedllm.runtime.ownership import Evidence, verify

SITE = MarkSite(name="layer", rows=16, columns=16)
OLD = "2020-01-01T00:00:00+00:00"
READ = [Reading("product", "as it is", 32, 32, p_value(32, 32))]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that nobody marked."""
    folder, draw = tmp_path / "adapter", torch.Generator().manual_seed(1)
    folder.mkdir()
    names = (f"base_model.model.layer.lora_{factor}.weight" for factor in "AB")
    sizes = ((4, 16), (16, 4))
    save_file(
        {n: torch.randn(s, generator=draw) for n, s in zip(names, sizes, strict=True)},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text('{"lora_alpha": 4}')
    return folder


@pytest.fixture
def suspect(adapter: Path) -> Suspect:
    return open_suspect(adapter, None)


def fitted(claim: Claim, suspect: Suspect) -> Claim:
    """Return the claim with the bits that are read in the suspect."""
    values = mark_values(claim, suspect, READINGS[0])
    return claim.model_copy(update={"bits": "".join("1" if one > 0 else "0" for one in values.tolist())})


def by_thief_alone(claim: Claim, time: str = OLD) -> OwnershipLog:
    """Return a log that the thief made by itself, with any date."""
    entries = (party_entry("thief", public_hex(KEYS["thief"])), commitment_entry(commit_to(claim, KEYS["thief"])))
    log = signed(OwnershipLog(entries), 0, time, by=["thief"])
    own = share_entry("thief", share_of(KEYS["thief"], log.first_root()))
    return signed(log.with_entries(own), 0, time, by=["thief"])


def judged(
    claims: Sequence[Claim], standings: Sequence[Standing | None], read: Sequence[Reading] = READ
) -> list[Verdict]:
    return judge(claims, standings, lambda claim: read)


def test_bits_that_were_read_off_the_model_under_a_key_alone_are_rejected(adapter: Path, tmp_path: Path) -> None:
    forged = fitted(claim_of("thief", sites=(SITE,), form="drawn"), open_suspect(adapter, None))
    claim = forged.model_copy(update={"form": "own-v1"})
    log = signed(
        OwnershipLog(
            (party_entry("thief", public_hex(KEYS["thief"])), commitment_entry(commit_to(claim, KEYS["thief"])))
        ),
        0,
        OLD,
        by=["thief"],
    )
    save_claim(claim, tmp_path / "thief.claim.json")
    (found,) = verify(adapter, Evidence([tmp_path / "thief.claim.json"], [folder_of(log, tmp_path / "log")]))
    assert found.status == "rejected" and "of the form `own-v1`" in found.sentence
    # Nor in a log with the shares of all, nor as the reader's own form.
    for form in ("own-v1", "drawn"):
        other = forged.model_copy(update={"form": form})
        assert f"of the form `{form}`" in standing(other, log_of(other, parties=("north", "thief"))).reasons[0]
    owner = claim_of()
    assert judged([owner], [standing(owner, log_of(owner))])[0].upheld


def test_keys_that_were_tried_in_a_log_of_one_party_are_rejected(suspect: Suspect) -> None:
    # Whoever is alone in a log can draw keys until one fits: nothing in the directions is another's.
    for _ in range(200):
        claim = claim_of("thief", sites=(SITE,), bits=new_bits(8), threshold=0.01)
        log = by_thief_alone(claim)
        assert directed(claim, log) is None
    check_log(log, where=Path("log"))
    (reason,) = standing(claim, log).reasons
    assert "the log has no party but `thief`" in reason
    owner = claim_of()
    log = log_of(owner)
    known = directed(owner, log)
    assert known is not None and standing(owner, log).reasons == ()


def test_the_threshold_is_the_arbiters(adapter: Path, tmp_path: Path) -> None:
    """Eight bits that all agree are one of 256 keys: they prove nothing, whatever the claim says of itself."""
    claim = claim_of("north", sites=(SITE,), bits="1" * 8, threshold=0.01)
    eight = [Reading("product", "as it is", 8, 8, p_value(8, 8))]
    (found,) = judged([claim], [standing(claim, log_of(claim))], eight)
    assert found.status == "not shown" and "threshold is 1e-06" in found.sentence
    (found,) = judge([claim], [standing(claim, log_of(claim))], lambda one: eight, threshold=0.01)
    assert found.upheld
    strict = claim_of(threshold=1e-12)
    (found,) = judged([strict], [standing(strict, log_of(strict))])
    assert found.status == "not shown" and found.threshold == 1e-12
    save_claim(claim, tmp_path / "north.claim.json")
    for wrong in (0.0, 0.5):
        with pytest.raises(ConfigError, match="BAD_VALUE"):
            verify(adapter, Evidence([tmp_path / "north.claim.json"], threshold=wrong))


def stamped(found: Standing, time: str) -> Standing:
    assert found.place is not None
    return replace(found, place=replace(found.place, stamp="5" * 64, stamp_time=time))


@pytest.fixture
def two() -> tuple[list[Claim], list[Standing]]:
    """The owner's claim, and that of a thief who, with an accomplice, dated a log of its own back to 2020."""
    claims = [claim_of(), claim_of("thief")]
    logs = [log_of(claims[0]), log_of(claims[1], parties=("thief", "east"), time=OLD)]
    return claims, [standing(claim, log) for claim, log in zip(claims, logs, strict=True)]


def test_where_dates_are_the_signers_own_word_none_of_two_claims_wins(
    two: tuple[list[Claim], list[Standing]],
) -> None:
    claims, standings = two
    found = judged(claims, standings)
    assert [one.status for one in found] == ["undecided"] * 2 and not any(one.upheld for one in found)
    assert "the marks of thief read too" in found[0].sentence and "--party-key" in found[0].sentence
    # Where only one of the marks is read there is nothing to decide; the date is still by the signers' word.
    shown = judge(claims, standings, lambda claim: READ if claim.party == "north" else [replace(READ[0], p=0.5)])
    assert [one.status for one in shown] == ["upheld", "not shown"]
    assert f"before {BEFORE}, by the word of those who signed the log" in shown[0].sentence


def test_a_verified_stamp_outranks_a_date_that_is_older_by_word(two: tuple[list[Claim], list[Standing]]) -> None:
    claims, (owner, thief) = two
    found = judged(claims, [stamped(owner, BEFORE), thief])
    assert [one.status for one in found] == ["upheld", "rejected"]
    assert "as a verified time stamp says" in found[0].sentence
    assert "a mark of north too" in found[1].sentence and "by the word of those who signed its log" in found[1].sentence
    # Of two stamps the older one wins, and the form in which a time is written is nothing.
    found = judged(claims, [stamped(owner, "2026-03-01T13:00:00+02:00"), stamped(thief, BEFORE)])
    assert [one.status for one in found] == ["upheld", "rejected"]
    assert "an older mark too, of north" in found[1].sentence
    found = judged(claims, [stamped(owner, AFTER), stamped(thief, BEFORE)])
    assert [one.status for one in found] == ["rejected", "upheld"]
    found = judged(claims, [stamped(owner, BEFORE), stamped(thief, BEFORE)])
    assert all(one.upheld for one in found)


def test_keys_that_are_known_bear_a_date_out_where_they_are_not_the_claimants() -> None:
    owner, thief = claim_of(), claim_of("thief")
    known = {name: fingerprint(public_hex(KEYS[name])) for name in ("north", "east")}
    log = log_of(owner)
    own = standing(owner, log, keys={"north": known["north"]})
    assert own.reasons == () and own.place is not None and not own.place.confirmed
    good = standing(owner, log, keys=known)
    forged = standing(thief, log_of(thief, parties=("thief", "south"), time=OLD))
    found = judged([owner, thief], [good, forged])
    assert [one.status for one in found] == ["upheld", "rejected"]
    assert "as parties signed whose keys are known" in found[0].sentence
    found = judged([owner, thief], [own, forged])
    assert [one.status for one in found] == ["undecided"] * 2


def test_claimants_of_one_log_share_a_model_beside_another_log() -> None:
    claims = [claim_of(), claim_of("east"), claim_of("thief")]
    log = log_of(*claims[:2])
    places = [stamped(standing(claims[0], log), BEFORE), standing(claims[1], log)]
    places.append(standing(claims[2], log_of(claims[2], parties=("thief", "south"), time=OLD)))
    assert [one.status for one in judged(claims, places)] == ["upheld", "upheld", "rejected"]


def test_several_commitments_of_one_party_in_a_log_prove_nothing() -> None:
    """Of fifty keys the one that fits best can be shown, and the correction counts one."""
    claims = [claim_of() for _ in range(50)]
    log = log_of(*claims)
    check_log(log, where=Path("log"))
    for claim in claims:
        assert "50 commitments of `north`, not one" in "; ".join(standing(claim, log).reasons)
    owner = claim_of()
    assert standing(owner, log_of(owner, claim_of("east"))).reasons == ()
    # What is put into a copy of the log afterwards harms no claim.
    assert standing(owner, log_of(owner, late=[claim_of()])).reasons == ()


def test_a_claim_in_a_model_that_nobody_marked_is_not_shown(suspect: Suspect) -> None:
    claim = claim_of(sites=(SITE,), key_seed=new_secret())
    known = directed(claim, log_of(claim))
    assert known is not None
    (found,) = judged([claim], [standing(claim, log_of(claim))], read_marks(known, suspect))
    assert found.status == "not shown"
