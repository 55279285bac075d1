"""Secure sums with every tuning method: the same bits as without; `make test` tries a part of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from combinations import METHODS, Combination
from families import TASKS, save_family
from table import allowed_on_page
from tiny import THOROUGH, TinyFederation

from fedllm.tasks import CAUSAL_LM

Make = Callable[..., TinyFederation]
WHOLE = THOROUGH or os.environ.get("FEDLLM_CONFORMANCE") == "all"
ALLOWED = allowed_on_page()
SIZES = {"north": 4, "east": 5, "south": 3}
GRID = {"federation.codec": {"name": "Grid", "limit": 0.5}, "federation.num_rounds": 2}
SECURE = {"privacy.secure_aggregation": {"enabled": True}}


@pytest.mark.parametrize("method", list(METHODS)[:: 1 if WHOLE else 4])
def test_a_run_has_the_same_bits_with_secure_sums_and_without(
    method: str, make_federation: Make, tmp_path: Path
) -> None:
    tried = (Combination(method, name, CAUSAL_LM) for name in TASKS[CAUSAL_LM])
    one = next(one for one in tried if ALLOWED[one])
    base = save_family(one.family, CAUSAL_LM, tmp_path / one.family)
    found: dict[str, Any] = {}
    for name, changes in {"plain": {}, "secure": SECURE}.items():
        job = GRID | {"peft": one.settings, "train.learning_rate": 0.02} | changes
        result = make_federation(name, base=base, sizes=SIZES, job=job).run()
        rows = [row for row in result.rows() if not row["name"].startswith(("seconds", "bytes"))]
        found[name] = result.status, result.adapter_sha256, rows
    assert found["plain"] == found["secure"]
    assert found["plain"][0] == "SUCCESS"
