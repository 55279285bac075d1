"""Marks through real runs: with and without secure sums, read back, and disputed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import TinyFederation, tiny_federation

from fedllm.runtime.ownership import Evidence, commit, verify

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
SUMS = {"privacy.secure_aggregation.enabled": True, "federation.weight_by": "equal"}


def committed(folder: Path, base: Path, **changes: Any) -> tuple[TinyFederation, list[Path]]:
    """Return a job whose claimants have committed, and their claims."""
    federation = tiny_federation(folder, base, sizes=FOUR, job=JOB | changes)
    return federation, [path for path, _ in commit(federation.job(), federation.parties())]


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[TinyFederation, list[Path], Path]:
    """A finished run with four claimants: the federation, the claims, the run folder."""
    federation, claims = committed(tmp_path_factory.mktemp("marked"), base)
    return federation, claims, federation.run().path


def test_every_claimant_is_read_back_from_the_adapter(marked: Any) -> None:
    _, claims, run = marked
    verdicts = verify(run, Evidence(claims, [run]))
    assert [verdict.status for verdict in verdicts] == ["upheld"] * 4
    assert all(verdict.p < 1e-6 and verdict.tries == 4 for verdict in verdicts)


def test_marks_go_through_a_secure_sum(tmp_path: Path, base: Path) -> None:
    federation, claims = committed(tmp_path, base, **SUMS)
    run = federation.run().path
    assert all(verdict.upheld and verdict.p < 1e-6 for verdict in verify(run, Evidence(claims, [run])))
