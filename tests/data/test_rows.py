"""The digest of a party's raw rows: of what is in its files, whatever a job makes of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from fedllm.data.formats import BadRecord
from fedllm.data.read import read_party_data
from fedllm.data.rows import DIGEST_KIND, row_hash, rows_digest
from fedllm.data.settings import DataSettings, DataSource

ROWS: list[dict[str, Any]] = [{"prompt": f"ask {i}", "completion": f"answer {i}", "who": f"w{i % 3}"} for i in range(6)]
Write = Callable[..., Path]


def digest_of(folder: Path, name: str = "train.jsonl", *, seed: int = 0, job: Any = None, **source: Any) -> str:
    settings, told = DataSettings(**job or {}), DataSource(train=name, **source)
    return read_party_data(told, base_dir=folder, settings=settings, seed=seed, party="north").digest


def test_rows_in_another_order_and_columns_in_another_order_are_the_same_data(
    write_jsonl: Write, tmp_path: Path
) -> None:
    write_jsonl(*ROWS)
    write_jsonl(*[dict(reversed(row.items())) for row in reversed(ROWS)], name="turned.jsonl")
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    found = digest_of(tmp_path)
    assert found.startswith(DIGEST_KIND)
    assert {digest_of(tmp_path, name) for name in ("turned.jsonl", "list.json")} == {found}


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[1:],
        [*ROWS, ROWS[0]],
        [ROWS[0] | {"completion": "another"}, *ROWS[1:]],
        # No layout uses it, and it tells of the person all the same.
        [ROWS[0] | {"who": "another"}, *ROWS[1:]],
        [ROWS[0] | {"extra": None}, *ROWS[1:]],
    ],
)
def test_one_changed_missing_or_doubled_row_is_other_data(
    write_jsonl: Write, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    write_jsonl(*ROWS)
    write_jsonl(*rows, name="other.jsonl")
    assert digest_of(tmp_path, "other.jsonl") != digest_of(tmp_path)


def test_nothing_that_a_job_says_changes_the_digest(write_jsonl: Write, tmp_path: Path) -> None:
    write_jsonl(*ROWS)
    jobs: list[dict[str, Any]] = [
        {"max_length": 8},
        {"completion_only_loss": False},
        {"group_by": "who"},
        {"group_by": "prompt"},
        {"dataset_text_field": "who"},
    ]
    found = {digest_of(tmp_path, job=job, format="prompt_completion") for job in jobs}
    assert found | {digest_of(tmp_path, seed=seed) for seed in range(3)} == {digest_of(tmp_path)}


def test_neither_held_out_examples_nor_the_mapping_of_columns_change_the_digest(
    write_jsonl: Write, tmp_path: Path
) -> None:
    write_jsonl(*ROWS)
    write_jsonl(ROWS[0], name="eval.jsonl")
    sources: list[dict[str, Any]] = [
        {"eval_share": 0.5},
        {"eval_share": 0},
        {"eval": "eval.jsonl"},
        {"columns": {"prompt": "completion", "completion": "prompt"}},
    ]
    assert {digest_of(tmp_path, **source) for source in sources} == {digest_of(tmp_path)}


def test_values_that_json_does_not_know_have_a_digest(tmp_path: Path) -> None:
    extra = {"day": date(2024, 1, 2), "picture": b"\x00\xff", "share": float("nan"), "tags": [{"a": 1}, None]}
    for name, rows in {"a": ROWS, "b": ROWS[::-1]}.items():
        parquet.write_table(pyarrow.Table.from_pylist([row | extra for row in rows]), tmp_path / f"{name}.parquet")
    assert digest_of(tmp_path, "a.parquet") == digest_of(tmp_path, "b.parquet")
    later = [ROWS[0] | extra | {"day": date(2024, 1, 3)}, *(row | extra for row in ROWS[1:])]
    parquet.write_table(pyarrow.Table.from_pylist(later), tmp_path / "c.parquet")
    assert digest_of(tmp_path, "c.parquet") != digest_of(tmp_path, "a.parquet")


def test_a_row_is_not_its_neighbour() -> None:
    """Where one value ends and the next begins is a part of what is hashed."""
    hashes = [row_hash({"a": "x", "b": "y"}), row_hash({"a": 'x","b":"y'}), row_hash({"a": "1"}), row_hash({"a": 1})]
    assert len(set(hashes)) == 4
    assert rows_digest(hashes) == rows_digest(hashes[::-1]) != rows_digest(hashes[1:])


def test_a_row_that_is_nested_too_deeply_is_a_bad_record() -> None:
    value: Any = "end"
    for _ in range(sys.getrecursionlimit() * 2):
        value = [value]
    with pytest.raises(BadRecord, match="nested"):
        row_hash({"a": value})
