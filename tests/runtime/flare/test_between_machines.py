"""Between machines a job does what it does on one: also where parties hide themselves, claim or re-align."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from between import make_kits, run_between
from offsite import EMULATOR, OWNER, offsite_federation, party_file
from offsite import SIZES as OFFSITE
from tiny import TinyFederation

from fedllm.privacy import noise
from fedllm.privacy.budget import PURSE_FOLDER
from fedllm.runs import folder
from fedllm.runtime.ownership import Evidence, commit, verify

Make = Callable[..., TinyFederation]
SIZES = {"north": 6, "east": 9, "south": 4}


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("kits"), sorted(SIZES | OFFSITE))


@pytest.fixture(autouse=True)
def sites(kits: Path, tmp_path: Path) -> None:
    shutil.copytree(kits, tmp_path / "sites")


@pytest.fixture(autouse=True)
def one_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both runs draw the same noise: their id and their key are part of it."""
    monkeypatch.setattr(noise, "secrets", SimpleNamespace(token_bytes=lambda count: bytes(range(count))))
    monkeypatch.setattr(folder.uuid, "uuid4", lambda: uuid.UUID(int=7))


def test_noise_that_parties_share_out_has_the_same_bits(make_federation: Make) -> None:
    hidden = {"unit": "party", "placement": "distributed", "noise_multiplier": 2.0, "clip_norm": 0.5}
    job: dict[str, Any] = {
        "federation.weight_by": "equal",
        "federation.keep": "last",
        "federation.drift_meter": False,
        "federation.codec": {"name": "Grid", "limit": 16.0},
        "privacy.secure_aggregation": {"enabled": True},
        "privacy.differential_privacy": hidden,
    }
    made = make_federation(sizes=SIZES, job=job)
    between, here = run_between(made), made.run("here")
    assert (between.status, between.adapter_sha256) == ("SUCCESS", here.adapter_sha256)
    # Each site keeps what it opened for all runs beside what it spent.
    books = (made.folder.parent / "sites").glob(f"site-*/{PURSE_FOLDER}/*.sums/{made.job().digest}.json")
    assert sorted(book.parent.name for book in books) == sorted(f"{party}.sums" for party in SIZES)


def test_a_realigned_emulator_has_the_same_bits(make_federation: Make) -> None:
    made = offsite_federation(
        make_federation, federation__num_rounds=3, federation__realign_every=1, federation__realign_steps=2
    )
    policy = {"plug_margin": -99.0, "full_zs_margin": -99.0}  # an owner who accepts whatever comes out
    own = {"public": "../data/public.jsonl", "distil_learning_rate": 0.02, "distil_batch_size": 4, "policy": policy}
    party_file(made.folder, OWNER, emulator=EMULATOR | own)
    between, here = run_between(made), made.run("here")
    assert (between.status, between.adapter_sha256) == ("SUCCESS", here.adapter_sha256)
    assert [row["value"] for row in between.rows() if row["name"] == "realigned"] == [1.0, 1.0]


def test_claims_are_upheld_and_every_site_has_the_log_that_all_signed(make_federation: Make, base: Path) -> None:
    job = {
        "federation.num_rounds": 6,
        "federation.keep": "last",
        "federation.eval_every": 0,
        "train.local_steps": 4,
        "peft.r": 4,
        "peft.target_modules": "all-linear",
        "ownership.carrier": "product",
        "ownership.claimants": ["north", "east"],
    }
    made = make_federation(sizes=SIZES, job=job)
    claims = [path for path, _ in commit(made.job(), made.parties())]
    between = run_between(made)
    assert between.status == "SUCCESS"
    copies = list((made.folder.parent / "sites").glob("site-*/state/runs/*/parties/*"))
    assert len(copies) == len(SIZES)
    for log in [between.path, *copies]:
        verdicts = verify(between.adapter, Evidence(claims, [log], base=base))
        assert all(verdict.upheld and verdict.p < 1e-6 for verdict in verdicts), log
