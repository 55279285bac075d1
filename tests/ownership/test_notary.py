"""The exchange between the keeper of the log and those who sign it, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from claims_made import OTHER_JOB, claim_of

from fedllm.errors import FedllmError, RunFailed, RunPaused, StateLost
from fedllm.ownership.commitments import ClaimFolder, commit_to
from fedllm.ownership.directions import share_of
from fedllm.ownership.log import FOLDER, OwnershipLog, check_log, commitment_entry, read_log, round_entry, share_entry
from fedllm.runs.folder import RunFolder, now
from fedllm.runtime.base import HeadSigned, Shown, SignHead
from fedllm.runtime.notary import Notary
from fedllm.runtime.signatory import Signatory
from fedllm.scenarios.base import Reply
from fedllm.wire.payload import Failure, Payload

JOB, ROOT = "a" * 64, "b" * 64


class Parties:
    """Hands requests to signatories, in the place of a federation; `absent` ones do not answer."""

    def __init__(self, signatories: Mapping[str, Signatory]) -> None:
        self.signatories, self.absent = dict(signatories), set[str]()

    @property
    def parties(self) -> tuple[str, ...]:
        return tuple(self.signatories)

    def ask(self, request: Any, *, round_: int, to: Sequence[str]) -> Iterator[Reply]:
        for party in to:
            asked = request if isinstance(request, Payload) else request[party]
            try:
                answer: Payload = self.signatories[party].answer(asked)
            except FedllmError as error:
                answer = Failure(code=error.code)
            yield Reply(party, Failure(code="ROUND_TIMEOUT") if party in self.absent else answer)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    run = RunFolder.create(tmp_path / "run", job_digest=JOB)
    yield run
    run.close()


@pytest.fixture
def parties(run: RunFolder, tmp_path: Path) -> Any:
    """Two parties, of which north has committed."""
    found = {}
    for party in ("north", "east"):
        keys = ClaimFolder(tmp_path / f"ownership-{party}")
        commitment = keys.write(claim_of()) if party == "north" else None
        copy = run.path / "parties" / party / FOLDER
        found[party] = Signatory(party, run.run_id, JOB, keys, copy, commitment, ("north",))
    return Parties(found)


def test_a_log_is_opened_once_and_grows(run: RunFolder, parties: Any) -> None:
    notary = Notary(run, ("north",))
    notary.open(parties)
    first = read_log(notary.folder)
    notary.open(parties)
    assert read_log(notary.folder) == first
    for number in range(3):
        notary.committed(parties, number, "e" * 64)
    log = read_log(notary.folder)
    check_log(log, where=run.path)
    # North's and east's keys, the commitment, and two shares; one head without the shares, and one with them.
    assert (len(log.heads), len(first.entries), log.entries[:5]) == (5, 5, first.entries)
    assert all(set(signed.signatures) == {"north", "east"} for signed in log.heads)


def test_a_claim_of_the_earlier_form_begins_no_run(run: RunFolder, parties: Any, tmp_path: Path) -> None:
    keys = ClaimFolder(tmp_path / "earlier")
    parties.signatories["north"] = replace(
        parties.signatories["north"], keys=keys, commitment=keys.write(claim_of(form="own-v1"))
    )
    with pytest.raises(RunFailed, match="OWNERSHIP_UNCOMMITTED"):
        Notary(run, ("north",)).open(parties)


def test_a_claimant_who_shows_nothing_stops_the_run(run: RunFolder, parties: Any) -> None:
    with pytest.raises(RunFailed, match="OWNERSHIP_UNCOMMITTED"):
        Notary(run, ("north", "east")).open(parties)
    assert not read_log(run.path / FOLDER).heads


@pytest.mark.parametrize("wrong", ["another job", "another party", "not signed"])
def test_a_commitment_that_is_not_to_this_job_is_refused(wrong: str, run: RunFolder, parties: Any) -> None:
    north = parties.signatories["north"]
    claim = claim_of(job=OTHER_JOB) if wrong == "another job" else claim_of("east" if "party" in wrong else "north")
    commitment = commit_to(claim, north.keys.key())
    if wrong == "not signed":
        commitment = commitment.model_copy(update={"signature": "0" * 128})
    parties.signatories["north"] = replace(north, commitment=commitment)
    with pytest.raises(RunFailed, match="BAD_SIGNATURE" if wrong == "not signed" else "OWNERSHIP_UNCOMMITTED"):
        Notary(run, ("north",)).open(parties)


def test_a_party_that_is_away_is_missed_in_one_head_and_catches_up(run: RunFolder, parties: Any) -> None:
    notary = Notary(run, ("north",))
    notary.open(parties)
    # It signs, and the answer is lost; then it does not hear of a head at all.
    parties.absent = {"east"}
    notary.committed(parties, 0, "e" * 64)
    east = parties.signatories.pop("east")
    notary.committed(parties, 1, "e" * 64)
    parties.absent, parties.signatories["east"] = set(), east
    notary.committed(parties, 2, "e" * 64)
    log = read_log(notary.folder)
    check_log(log, where=run.path)
    assert [sorted(signed.signatures) for signed in log.heads] == [
        ["east", "north"],
        ["east", "north"],
        ["north"],
        ["north"],
        ["east", "north"],
    ]
    assert read_log(east.copy).entries == log.entries


def test_the_run_waits_for_all_to_sign_before_round_0(run: RunFolder, parties: Any) -> None:
    notary = Notary(run, ("north",))
    parties.absent = {"east"}
    with pytest.raises(RunPaused):
        notary.open(parties)
    parties.absent = set()
    notary.open(parties)
    assert set(read_log(notary.folder).heads[0].signatures) == {"east", "north"}


def asked(run: RunFolder, parties: Any, **changes: Any) -> SignHead:
    """Return what the server asks north to sign after round 0, with changes to the head or the entries."""
    notary = Notary(run, ("north",))
    notary.open(parties)
    log = read_log(notary.folder)
    entries = changes.pop("entries", [*log.entries, '{"checkpoint":"","kind":"round","round":0}'])
    grown = type(log)(tuple(entries), log.heads)
    facts = {"run_id": run.run_id, "job_digest": JOB} | {
        k: v for k, v in changes.items() if k in ("run_id", "job_digest")
    }
    head = grown.head(0, changes.get("time", datetime.now(UTC).isoformat(timespec="milliseconds")), **facts)
    head = head.model_copy(update={k: v for k, v in changes.items() if k == "root"})
    return SignHead(head=head.model_dump_json(), since=0, entries=entries, signatures={})


def test_a_head_that_follows_is_signed(run: RunFolder, parties: Any) -> None:
    assert isinstance(parties.signatories["north"].answer(asked(run, parties)), HeadSigned)
    assert isinstance(parties.signatories["east"].answer(type("Show", (), {})()), Shown)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"time": (datetime.now(UTC) + timedelta(hours=3)).isoformat(timespec="seconds")}, "more than an hour"),
        ({"time": (datetime.now(UTC) - timedelta(minutes=5)).isoformat(timespec="seconds")}, "older than the last"),
        ({"run_id": "f" * 32}, "another run"),
        ({"job_digest": OTHER_JOB}, "another run"),
        ({"root": "0" * 64}, "not that of its entries"),
    ],
)
def test_a_head_that_does_not_follow_is_not_signed(
    changes: dict[str, Any], what: str, run: RunFolder, parties: Any
) -> None:
    request = asked(run, parties, **changes)
    with pytest.raises(StateLost, match=what):
        parties.signatories["north"].answer(request)


def test_a_party_signs_nothing_without_its_own_commitment_in_it(run: RunFolder, parties: Any) -> None:
    request = asked(run, parties)
    fresh = replace(parties.signatories["north"], copy=run.path / "elsewhere")
    without = [entry for entry in request.entries if '"kind":"commitment"' not in entry]
    with pytest.raises(StateLost, match="own key, commitment or share"):
        fresh.answer(asked(run, parties, entries=without))
    assert isinstance(fresh.answer(request), HeadSigned)
    with pytest.raises(StateLost, match="changed or taken out"):
        fresh.answer(asked(run, parties, entries=without))


@pytest.mark.parametrize("more", ["a second one of the claimant", "one of a party that claims nothing"])
def test_a_party_signs_one_commitment_of_each_claimant_and_none_of_others(
    more: str, run: RunFolder, parties: Any
) -> None:
    request = asked(run, parties)
    name = "north" if "second" in more else "east"
    added = commitment_entry(commit_to(claim_of(name), parties.signatories[name].keys.key()))
    shown = [entry for entry in request.entries if '"kind":"share"' not in entry and '"kind":"round"' not in entry]
    east = replace(parties.signatories["east"], copy=run.path / "elsewhere")
    for entries, is_good in ((shown, True), ([*shown, added], False)):
        head = OwnershipLog(tuple(entries)).head(0, now(), run_id=run.run_id, job_digest=JOB)
        one = SignHead(head=head.model_dump_json(), since=0, entries=entries, signatures={})
        if is_good:
            assert isinstance(replace(east, copy=run.path / "good").answer(one), HeadSigned)
            continue
        what = "2 commitments of `north`" if name == "north" else "a commitment of `east`, no claimant"
        with pytest.raises(StateLost, match=what):
            east.answer(one)


def test_shares_are_the_same_after_a_crash_before_they_are_signed(run: RunFolder, parties: Any) -> None:
    notary = Notary(run, ("north",))
    write, written = OwnershipLog.write, list[OwnershipLog]()

    def once(log: OwnershipLog, folder: Path) -> None:
        # The server ends after the parties signed the shares, and before it wrote that down.
        if folder == notary.folder and written:
            raise KeyboardInterrupt
        write(log, folder)
        written.extend([log] if folder == notary.folder else [])

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OwnershipLog, "write", once)
        notary.open(parties)
    assert read_log(parties.signatories["east"].copy).entries == written[0].entries
    notary.open(parties)
    log = read_log(notary.folder)
    check_log(log, where=run.path)
    assert log.entries == written[0].entries and log.shares().keys() == {"north", "east"}


@pytest.mark.parametrize("change", ["left out", "left out for the next one", "another's", "of another root"])
def test_a_party_signs_no_shares_that_were_changed(change: str, run: RunFolder, parties: Any) -> None:
    notary = Notary(run, ("north",))
    notary.open(parties)
    log, north = read_log(notary.folder), parties.signatories["north"]
    shares, keys = log.shares(), {name: one.keys.key() for name, one in parties.signatories.items()}
    entries = [entry for entry in log.entries if '"kind":"share"' not in entry]
    if change == "left out for the next one":
        entries.append(round_entry(0, "e" * 64))
    elif change == "left out":
        entries.append(share_entry("north", shares["north"]))
    else:
        east = share_of(keys["north" if change == "another's" else "east"], "0" * 64 if "root" in change else ROOT)
        entries += [share_entry("north", shares["north"]), share_entry("east", east)]
    # North has signed the keys and commitments alone.
    copy = run.path / "elsewhere"
    OwnershipLog(log.entries[:3], log.heads[:1]).write(copy)
    head = OwnershipLog(tuple(entries)).head(0, now(), run_id=run.run_id, job_digest=JOB)
    request = SignHead(head=head.model_dump_json(), since=0, entries=entries, signatures={})
    with pytest.raises(StateLost, match="commitment or share" if "next" in change else "shares in the log"):
        replace(north, copy=copy).answer(request)
    good = request.model_copy(
        update={
            "entries": list(log.entries),
            "head": log.head(0, now(), run_id=run.run_id, job_digest=JOB).model_dump_json(),
        }
    )
    assert isinstance(replace(north, copy=copy).answer(good), HeadSigned)
