"""A key that was chosen after a trial run of the same job fits what comes out, unless the log says where bits are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from claims_made import KEYS, claim_of, log_of, signed
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tiny import tiny_federation

from fedllm.errors import StateLost
from fedllm.ownership.claims import BOUND, DRAWN, Claim, MarkSite, new_secret
from fedllm.ownership.directions import directed, share_of
from fedllm.ownership.disputes import standing
from fedllm.ownership.log import OwnershipLog, check_log, share_entry
from fedllm.ownership.marks import unit_rows
from fedllm.ownership.suspect import READINGS, Suspect, open_suspect
from fedllm.ownership.verify import Verdict, judge, mark_values, read_marks

NUM_KEYS = 2000
SITES = (MarkSite(name="model.layers.0.self_attn.v_proj", rows=16, columns=32),)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Suspect:
    """What the job comes to without any mark; the trial, and the run itself, which has the same seeds."""
    job = {"federation.num_rounds": 2, "train.local_steps": 3, "federation.keep": "last"}
    run = tiny_federation(tmp_path_factory.mktemp("trial"), base, sizes={"north": 6, "east": 5}, job=job).run()
    return open_suspect(run.path, None)


def chosen(outcome: Suspect, trial: OwnershipLog | None) -> Claim:
    """Return the claim of thief whose key and bits, of 2,000 keys, fit an outcome best.

    `trial` is its trial's log; without one, its key alone says where its bits are.
    """
    draft = claim_of("thief", sites=SITES, form=BOUND if trial else DRAWN)
    best = (0.0, draft)
    for _ in range(NUM_KEYS):
        claim = draft.model_copy(update={"key_seed": new_secret()})
        known = directed(claim, trial) if trial else claim
        assert known is not None
        values = mark_values(known, outcome, READINGS[0])
        clear = float(values.abs().min() / values.std())
        if clear > best[0]:
            best = clear, claim.model_copy(update={"bits": "".join("1" if one > 0 else "0" for one in values)})
    return best[1]


def verdict(claim: Claim, log: OwnershipLog, outcome: Suspect) -> Verdict:
    def read(one: Claim) -> Any:
        known = directed(one, log)
        return read_marks(known, outcome) if known else []

    return judge([claim], [standing(claim, log)], read)[0]


def test_a_key_that_fits_a_trial_run_proves_nothing_where_the_log_says_where_bits_are(outcome: Suspect) -> None:
    # With the key alone, the attack works: nobody marked this model, and all bits agree. So no log bears it out.
    keyed = chosen(outcome, None)
    assert read_marks(keyed, outcome)[0].p < 1e-9
    for shares in (False, True):
        claim = keyed.model_copy(update={"form": "own-v1"})
        found = verdict(claim, log_of(claim, parties=("north", "thief"), shares=shares), outcome)
        assert found.status == "rejected" and "of the form `own-v1` and not of `own-v2`" in found.sentence

    # In secret the thief plays north's part too, with north's name and a key that it made.
    made = {"north": Ed25519PrivateKey.generate(), "thief": KEYS["thief"]}
    trial = log_of(claim_of("thief"), parties=("north", "thief"), shares=False)
    shares = (share_entry(party, share_of(key, trial.heads[0].head.root)) for party, key in made.items())
    trial = trial.with_entries(*shares)
    bound = chosen(outcome, trial)
    known = directed(bound, trial)
    assert known is not None and read_marks(known, outcome)[0].matches == 32
    found = verdict(
        bound,
        log_of(
            bound,
            parties=("north", "thief"),
        ),
        outcome,
    )
    assert (found.status, found.reasons) == ("not shown", ()) and found.p > 1e-6


def test_directions_follow_from_key_root_and_the_others_shares() -> None:
    claim, other = claim_of(form=BOUND), claim_of("east", form=BOUND)
    log = log_of(claim)
    seeds = {directed(claim, log).key_seed}  # type: ignore[union-attr]
    assert directed(claim, log_of(claim)).key_seed in seeds  # type: ignore[union-attr]
    # Another key, another commitment beside it, another party's share; its own share, which it could vary, is not in.
    seeds.add(directed(claim.model_copy(update={"key_seed": new_secret()}), log).key_seed)  # type: ignore[union-attr]
    seeds.add(directed(claim, log_of(claim, other)).key_seed)  # type: ignore[union-attr]
    for party, is_in in (("east", True), ("north", False)):
        entries = [
            share_entry(party, "0" * 128) if json.loads(one)["kind"] == "share" and f'"{party}"' in one else one
            for one in log.entries
        ]
        changed = OwnershipLog(tuple(entries), log.heads)
        assert (directed(claim, changed).key_seed not in seeds) == is_in  # type: ignore[union-attr]
        with pytest.raises(StateLost, match=f"share of `{party}`"):
            check_log(OwnershipLog(tuple(entries), log.heads[:1]), where=Path("log"))
    assert len(seeds) == 3


def test_a_log_without_all_shares_says_nothing() -> None:
    claim = claim_of(form=BOUND)
    for log in (log_of(claim, shares=False), None):
        assert directed(claim, log) is None
    (reason,) = standing(claim, log_of(claim, shares=False)).reasons
    assert "not the shares of all parties" in reason
    found = judge([claim], [standing(claim, log_of(claim, shares=False))], lambda one: [])
    assert found[0].status == "rejected" and "though" not in found[0].sentence
    with pytest.raises(ValueError, match="follows from its log"):
        unit_rows(claim, claim.sites[0], "rows")


def test_a_claim_has_one_hash_whatever_its_file_leaves_out() -> None:
    fields = claim_of().model_dump(mode="json")
    assert fields.pop("form") == BOUND
    claim = Claim.model_validate_json(json.dumps(fields))
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert claim.commitment() == hashlib.sha256(b"fedllm own-v2\0" + text.encode()).hexdigest()
    assert claim.commitment() != claim.model_copy(update={"form": "own-v1"}).commitment()
    known = directed(claim, log_of(claim))
    assert known is not None and standing(known, log_of(known)).reasons
    assert torch.equal(*(unit_rows(known, claim.sites[0], "rows") for _ in range(2)))


def test_a_head_with_shares_in_it_is_not_the_first(tmp_path: Path) -> None:
    log = log_of(claim_of(form=BOUND))
    with pytest.raises(StateLost, match="from before round 0 is missing"):
        check_log(OwnershipLog(log.entries, log.heads[1:]), where=tmp_path)
    assert signed(log, 1, log.heads[-1].head.time, by=["north"]).heads[-1].signatures.keys() == {"north"}
