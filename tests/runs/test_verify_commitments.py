"""`fedllm verify RUN` on the log of commitments: signed by all, a commitment of each claimant, nothing unsigned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import TinyFederation, tiny_federation

from fedllm.ownership.commitments import ClaimFolder
from fedllm.ownership.directions import share_of
from fedllm.ownership.keys import sign
from fedllm.ownership.log import (
    FOLDER,
    HEAD_PURPOSE,
    OwnershipLog,
    SignedHead,
    check_log,
    read_log,
    round_entry,
    share_entry,
)
from fedllm.runs.verify_logs import Look, check_commitments
from fedllm.runtime.ownership import commit

PARTIES = ("north", "east")
JOB: dict[str, Any] = {
    "federation.num_rounds": 1,
    "train.local_steps": 1,
    "federation.keep": "last",
    "ownership.claimants": ["north"],
    "ownership.num_triggers": 2,
    "data.max_length": 64,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[TinyFederation, Path]:
    federation = tiny_federation(tmp_path_factory.mktemp("claimed"), base, sizes=dict.fromkeys(PARTIES, 5), job=JOB)
    commit(federation.job(), federation.parties())
    return federation, federation.run().path


def found_in(run: Path, log: OwnershipLog) -> str:
    """Return what the check of a run says of another log in its folder, which is whole in itself."""
    shutil.rmtree(run / FOLDER)
    log.write(run / FOLDER)
    check_log(read_log(run / FOLDER), where=run)
    look = Look(run, None)
    check_commitments(look)
    return "; ".join(problem.what for problem in look.problems)


def rebuilt(federation: TinyFederation, log: OwnershipLog, *, commitments: Sequence[str]) -> OwnershipLog:
    """Return the log with other commitments, as all parties together could sign it."""
    folder, facts = federation.folder / "parties", log.heads[0].head
    keys = {party: ClaimFolder(folder / f"ownership-{party}").key() for party in PARTIES}

    def signed(grown: OwnershipLog, number: int) -> OwnershipLog:
        head = grown.head(number, facts.time, run_id=facts.run_id, job_digest=facts.job_digest)
        signatures = {party: sign(key, head.text(), purpose=HEAD_PURPOSE) for party, key in keys.items()}
        return grown.with_head(SignedHead(head=head, signatures=signatures))

    kinds = {kind: [one for one in log.entries if json.loads(one)["kind"] == kind] for kind in ("party", "round")}
    made = signed(OwnershipLog((*kinds["party"], *commitments)), 0)
    shares = (share_entry(party, share_of(key, made.first_root())) for party, key in keys.items())
    made = signed(made.with_entries(*shares), 0)
    for number, entry in enumerate(kinds["round"]):
        made = signed(made.with_entries(entry), number)
    return made


def test_each_claimant_has_one_commitment_in_the_log(finished: tuple[TinyFederation, Path], tmp_path: Path) -> None:
    federation, path = finished
    run = Path(shutil.copytree(path, tmp_path / "run"))
    log = read_log(run / FOLDER)
    own = [entry for entry in log.entries if json.loads(entry)["kind"] == "commitment"]
    assert found_in(run, log) == "" and found_in(run, rebuilt(federation, log, commitments=own)) == ""
    assert "0 commitments of `north`, not one" in found_in(run, rebuilt(federation, log, commitments=[]))
    assert "2 commitments of `north`, not one" in found_in(run, rebuilt(federation, log, commitments=own * 2))


@pytest.mark.parametrize("place", [0, 1])
def test_all_parties_signed_what_was_there_before_round_0(
    place: int, finished: tuple[TinyFederation, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished[1], tmp_path / "run"))
    log = read_log(run / FOLDER)
    heads = list(log.heads)
    heads[place] = heads[place].model_copy(update={"signatures": {"north": heads[place].signatures["north"]}})
    said = found_in(run, OwnershipLog(log.entries, tuple(heads)))
    assert said == "the log of commitments has a head from before round 0 that is not signed by east"
    # The shares are entries from before round 0 too.
    without = OwnershipLog(log.entries, (log.heads[0], *log.heads[2:]))
    assert "2 entries from before round 0 that no head of that time is over" in found_in(run, without)


def test_what_nobody_signed_is_named(finished: tuple[TinyFederation, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished[1], tmp_path / "run"))
    log = read_log(run / FOLDER)
    added = log.with_entries(round_entry(7, "e" * 64))
    assert "1 entries at its end that nobody signed" in found_in(run, added)
    head = added.head(
        7, log.heads[-1].head.time, run_id=log.heads[0].head.run_id, job_digest=log.heads[0].head.job_digest
    )
    assert "nobody signed" in found_in(run, added.with_head(SignedHead(head=head, signatures={})))
    # A party that was away for the last rounds is missed, and that is no fault.
    last = log.heads[-1]
    away = last.model_copy(update={"signatures": {"east": last.signatures["east"]}})
    assert found_in(run, OwnershipLog(log.entries, (*log.heads[:-1], away))) == ""
