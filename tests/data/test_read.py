from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.data.formats import Example
from fedllm.data.read import read_examples
from fedllm.data.settings import DataSource
from fedllm.errors import DataError

PAIRS = [{"prompt": f"问题 {i}", "completion": f"答案 {i}"} for i in range(5)]
EXAMPLES = tuple(Example(prompt=pair["prompt"], completion=pair["completion"]) for pair in PAIRS)
Write = Callable[..., Path]


def read(path: Path | str, **options: Any) -> tuple[Example, ...]:
    return read_examples(str(path), base_dir=Path("/"), **options)


def refusal(path: Path | str, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert caught.value.fix, "every refusal says what to do"
    return caught.value


def test_jsonl_is_read(write_jsonl: Write) -> None:
    assert read(write_jsonl(*PAIRS)) == EXAMPLES


def test_relative_paths_start_at_the_base_folder(write_jsonl: Write, tmp_path: Path) -> None:
    write_jsonl(*PAIRS)
    assert read_examples("train.jsonl", base_dir=tmp_path) == EXAMPLES


def test_byte_order_mark_crlf_and_line_separators_in_texts_do_no_harm(tmp_path: Path) -> None:
    pairs = [*PAIRS, {"prompt": "one\u2028two\u0085three", "completion": "a\r\nb"}]
    text = "\ufeff" + "\r\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)
    (tmp_path / "train.jsonl").write_bytes(text.encode())
    *head, last = read(tmp_path / "train.jsonl")
    assert tuple(head) == EXAMPLES
    assert (last.prompt, last.completion) == ("one\u2028two\u0085three", "a\r\nb")


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_read(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "train.json").write_text(json.dumps(PAIRS, indent=indent), encoding="utf-8")
    assert read(tmp_path / "train.json") == EXAMPLES


def test_json_lines_under_the_suffix_json_are_read(write_jsonl: Write) -> None:
    assert read(write_jsonl(*PAIRS, name="train.json")) == EXAMPLES


@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
def test_csv_is_read_with_quotes_line_breaks_and_long_cells(tmp_path: Path, suffix: str, mark: str) -> None:
    long = "长" * 200_000
    text = f'\ufeffprompt{mark}completion\r\n"a, ""b""\r\nc"{mark}answer\r\n问{mark}{long}\r\n'
    (tmp_path / f"train.{suffix}").write_bytes(text.encode())
    assert read(tmp_path / f"train.{suffix}") == (
        Example(prompt='a, "b"\nc', completion="answer"),
        Example(prompt="问", completion=long),
    )


def test_reading_csv_leaves_the_global_limit_of_the_csv_module_alone(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    (tmp_path / "train.csv").write_text("text\nhello\n")
    read(tmp_path / "train.csv")
    assert csv.field_size_limit() == before


def test_parquet_is_read_with_nested_messages(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "答"}]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [turns, turns]}), tmp_path / "train.parquet")
    first, second = read(tmp_path / "train.parquet")
    assert first == second
    assert [message.content for message in first.messages] == ["q", "答"]


def test_a_saved_data_set_and_its_splits_are_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(PAIRS), test=Dataset.from_list(PAIRS[:1])).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one") == EXAMPLES
    assert read(tmp_path / "two", split="test") == EXAMPLES[:1]
    assert "several splits: test, train" in refusal(tmp_path / "two").what
    assert refusal(tmp_path / "two", split="tset").fix == "did you mean `test`?"


def test_a_folder_of_files_is_read_by_split(tmp_path: Path) -> None:
    for name, pairs in {"b.jsonl": PAIRS[2:], "a.jsonl": PAIRS[:2], "my-test.jsonl": PAIRS[:1]}.items():
        (tmp_path / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path, split="train") == EXAMPLES
    assert read(tmp_path, split="test") == EXAMPLES[:1]
    assert "there is no split 'validation'" in refusal(tmp_path, split="validation").what


def test_a_subfolder_can_be_a_split(tmp_path: Path) -> None:
    (tmp_path / "north").mkdir()
    (tmp_path / "north" / "x.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    assert read(tmp_path, split="north") == EXAMPLES[:1]


def test_a_hub_id_is_asked_for_by_name_and_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return datasets.DatasetDict(train=datasets.Dataset.from_list(PAIRS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("some-org/adverts", split="train") == EXAMPLES
    assert asked == [(("some-org/adverts",), {})]


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)
RECORDS = st.lists(st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}), min_size=1, max_size=5)


@settings(max_examples=40)
@given(RECORDS, st.booleans())
def test_any_text_survives_jsonl_json_and_csv(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str]], ascii_only: bool
) -> None:
    import csv

    folder = tmp_path_factory.mktemp("data")
    (folder / "a.jsonl").write_text("".join(json.dumps(r, ensure_ascii=ascii_only) + "\n" for r in records))
    (folder / "a.json").write_text(json.dumps(records, ensure_ascii=ascii_only))
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(records)
    expected = tuple(Example(**record) for record in records)
    assert read(folder / "a.jsonl") == read(folder / "a.json") == read(folder / "a.csv") == expected


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ({"columns": {"promt": "q"}}, "did you mean `prompt`"),
        ({"columns": {"prompt": "q"}, "format": "messages"}, "'messages' has 'prompt'"),
        ({"columns": {"prompt": "q", "text": "t"}}, "belong to different layouts"),
        ({"eval": "e.jsonl", "eval_share": 0.2}, "eval_share has no effect"),
        ({"eval_share": 1.0}, "less than 1"),
        ({"fromat": "text"}, "Extra inputs"),
    ],
)
def test_a_party_file_that_makes_no_sense_is_refused(source: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        DataSource.model_validate({"train": "t.jsonl"} | source)


def test_reading_imports_neither_torch_nor_transformers() -> None:
    import subprocess
    import sys

    code = "import sys, fedllm.data.read, fedllm.data.settings; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
