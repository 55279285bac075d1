"""Runs with differential privacy, over the wire: what is told, what is paid, and the same bits after a crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rounds import broken_and_resumed
from tiny import TinyFederation

from fedllm.privacy.accountant import Mechanism, epsilon_of
from fedllm.privacy.ledger import Ledger
from fedllm.runs.jsonl import read_rows

Make = Callable[..., TinyFederation]
SIZES = {"north": 6, "south": 9}
NOISE: dict[str, Any] = {"unit": "example", "noise_multiplier": 1.5, "accountant": "RDP"}
PLAN: dict[str, Any] = {"federation.num_rounds": 3, "privacy.differential_privacy": NOISE}


@pytest.fixture
def one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all runs draw the same noise: their id and their key are part of it."""
    import uuid

    from fedllm.privacy import noise
    from fedllm.runs import folder

    monkeypatch.setattr(noise.secrets, "token_bytes", lambda count: bytes(range(count)))
    monkeypatch.setattr(folder.uuid, "uuid4", lambda: uuid.UUID(int=7))


def ledger_of(federation: TinyFederation, party: str) -> Ledger:
    return Ledger(federation.folder / "parties" / "privacy" / f"{party}.jsonl")


def test_a_run_pays_for_each_round_and_tells_nothing_but_epsilon(make_federation: Make) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN)
    result = federation.run()
    assert result.status == "SUCCESS"
    rows = read_rows(result.path / "metrics.jsonl")
    for party, size in SIZES.items():
        spent = {row["round"]: row["value"] for row in rows if (row["party"], row["name"]) == (party, "epsilon_spent")}
        expected = {
            number: epsilon_of([Mechanism(3 / size, 1.5, 2 * number)], delta=1e-5, accountant="RDP")
            for number in (1, 2, 3)
        }
        assert spent == pytest.approx(expected, rel=1e-6)
        assert [charge.round for charge in ledger_of(federation, party).charges()] == [1, 2, 3]
    told = {row["name"] for row in rows if row["split"] == "train" and row["value"] is not None}
    assert told == {"steps"}
    own = read_rows(result.path / "parties" / "north" / "metrics.jsonl")
    assert not {row["name"] for row in own if row["split"] == "train"} & {"loss_nats", "tokens", "examples"}


def test_a_broken_run_goes_on_with_the_same_bits_and_pays_once(make_federation: Make, one_key: None) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN)
    expected = federation.run("unbroken").adapter_sha256
    paid = ledger_of(federation, "north").charges()
    for file in (federation.folder / "parties" / "privacy").iterdir():
        file.unlink()
    assert broken_and_resumed(federation, after=2).adapter_sha256 == expected
    assert ledger_of(federation, "north").charges() == paid


def test_two_runs_have_other_noise(make_federation: Make) -> None:
    federation = make_federation(sizes=SIZES, job=PLAN | {"federation.num_rounds": 1})
    assert federation.run("one").adapter_sha256 != federation.run("two").adapter_sha256
    assert len({charge.run for charge in ledger_of(federation, "north").charges()}) == 2
