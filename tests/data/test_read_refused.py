from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm.data import files
from fedllm.data.formats import ColumnMap, Example
from fedllm.data.read import read_examples, scan_source
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


def test_broken_lines_are_refused_by_number_and_never_quoted(write_jsonl: Write) -> None:
    path = write_jsonl(
        PAIRS[0],
        '{"prompt": "SECRET',
        "",
        '["SECRET"]',
        '{"prompt": "SECRET", "completion": NaN}',
        '{"prompt": "SECRET", "prompt": "x", "completion": "y"}',
        '{"prompt": "SECRET", "completion": ""}',
        '{"prompt": "SECRET"} {"completion": "SECRET"}',
    )
    error = refusal(path)
    assert error.code == "DATA_BROKEN_LINE"
    assert error.where == f"{path}:2"
    assert "7 of 8 records cannot be used" in error.what
    for piece in ("line 2: not JSON", "line 3: empty line", "line 4: not a JSON object", "line 5: NaN", "and 2 more"):
        assert piece in error.what
    assert "line 6: the same key stands twice" in error.what
    assert "SECRET" not in str(error)
    scan = scan_source(str(path), base_dir=Path("/"), split=None, column_map=ColumnMap())
    assert [problem.place.number for problem in scan.problems] == [2, 3, 4, 5, 6, 7, 8]
    assert "SECRET" not in repr(scan)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b'{"text": "\xff"}\n', "line 1: not UTF-8 (byte 11)"),
        (b'{"text": "a"}\n{}\n', "line 2: an empty object"),
        (b'{"text": "a"}\n' + b'{"a":' * 100_000 + b"\n", "line 2: not usable JSON: nested too deeply"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "line 1: not usable JSON: a number has too many digits"),
        (b'{"text": "a"}\n{"text": "\\ud83d"}\n', "line 2: `text` holds half a character"),
        (b'{"text": "a", "n": -Infinity}\n', "line 1: -Infinity is not JSON"),
    ],
)
def test_a_broken_line_says_what_is_wrong(tmp_path: Path, raw: bytes, why: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(raw)
    error = refusal(tmp_path / "train.jsonl")
    assert error.code == "DATA_BROKEN_LINE"
    assert why in error.what


def test_a_gigantic_line_is_skipped_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    lines = [json.dumps(PAIRS[0]), json.dumps({"text": "x" * 1000}), json.dumps(PAIRS[1])]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    error = refusal(tmp_path / "train.jsonl")
    assert "1 of 3 records cannot be used (line 2: longer than" in error.what


def test_utf16_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(json.dumps(PAIRS[0]).encode("utf-16"))
    assert "UTF-16" in refusal(tmp_path / "train.jsonl").what
    (tmp_path / "train.json").write_bytes(json.dumps(PAIRS).encode("utf-16"))
    assert "UTF-16" in refusal(tmp_path / "train.json").what


@pytest.mark.parametrize("cut", [1, 30, 60])
def test_a_json_list_that_is_cut_off_is_refused_with_its_line(tmp_path: Path, cut: int) -> None:
    (tmp_path / "train.json").write_text(json.dumps(PAIRS, indent=1)[:-cut])
    error = refusal(tmp_path / "train.json")
    assert error.code == "DATA_BROKEN_LINE"
    assert "not JSON" in error.what


def test_items_of_a_json_list_are_reported_by_the_line_on_which_they_begin(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('[\n {"text": "a"},\n\n "SECRET",\n {"text":\n  ""}\n]')
    error = refusal(tmp_path / "train.json")
    assert "line 4: not a JSON object" in error.what
    assert "line 5: `text` is empty" in error.what


def test_a_json_container_is_refused_with_its_columns(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps({"version": 1, "rows": PAIRS}, indent=1))
    error = refusal(tmp_path / "train.json")
    assert error.code == "DATA_FORMAT_UNKNOWN"
    assert "`version`, `rows`" in error.what


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("prompt,completion\na,b\nonly one\n", "line 3: 1 cells where the first line names 2 columns"),
        ("prompt,completion\na,b\n\nc,d\n", "line 3: empty line"),
        ("prompt,completion\na,\n", "line 2: `completion` is empty"),
        ('prompt,completion\na,"b" c\n', "line 2: not CSV"),
        ('prompt,completion\na,b\nc,"d\n', "line 3: not CSV"),
    ],
)
def test_broken_csv_lines_are_refused_by_number(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "train.csv").write_text(text)
    error = refusal(tmp_path / "train.csv")
    assert error.code == "DATA_BROKEN_LINE"
    assert why in error.what


def test_csv_cells_that_are_not_utf8_are_refused_by_number(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(b"prompt,completion\na,b\nc,\xe9\n")
    assert "line 3: not UTF-8" in refusal(tmp_path / "train.csv").what


@pytest.mark.parametrize("header", ["prompt,prompt", "prompt,"])
def test_a_csv_header_names_each_column_once(tmp_path: Path, header: str) -> None:
    (tmp_path / "train.csv").write_text(f"{header}\na,b\n")
    error = refusal(tmp_path / "train.csv")
    assert (error.code, error.where) == ("DATA_BROKEN_LINE", f"{tmp_path}/train.csv:1")


def test_semicolons_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("prompt;completion\na;b\n")
    assert "semicolons" in refusal(tmp_path / "train.csv").fix


def test_an_unknown_layout_names_the_columns_and_the_nearest_layout(write_jsonl: Write) -> None:
    error = refusal(write_jsonl({"question": "SECRET", "answer": "SECRET", "id": 3}))
    assert error.code == "DATA_FORMAT_UNKNOWN"
    assert "`question`, `answer`, `id`" in error.what
    assert "columns: {prompt: question, completion: answer}" in error.fix
    assert "SECRET" not in str(error)


def test_the_mapping_that_the_error_proposes_works(write_jsonl: Write) -> None:
    path = write_jsonl({"question": "q", "answer": "a"})
    assert read(path, columns={"prompt": "question", "completion": "answer"}) == (Example(prompt="q", completion="a"),)


def test_an_ambiguous_layout_is_a_question_and_format_answers_it(write_jsonl: Write) -> None:
    path = write_jsonl({"instruction": "i", "input": "", "output": "o", "text": "i o"})
    error = refusal(path)
    assert error.code == "DATA_FORMAT_UNKNOWN"
    assert "`instruction`, `text`" in error.what
    assert read(path, format="text") == (Example(text="i o"),)


def test_mixed_layouts_are_refused_with_their_lines(write_jsonl: Write) -> None:
    error = refusal(write_jsonl(PAIRS[0], {"text": "t"}, PAIRS[1], {"text": "u"}))
    assert error.code == "DATA_FORMAT_UNKNOWN"
    assert "prompt_completion (lines 1, 3)" in error.what
    assert "text (lines 2, 4)" in error.what


def test_a_few_records_without_the_columns_are_broken_lines(write_jsonl: Write) -> None:
    error = refusal(write_jsonl(PAIRS[0], {"promt": "q", "completion": "a"}, PAIRS[1]))
    assert error.code == "DATA_BROKEN_LINE"
    assert "line 2: lacks `prompt`" in error.what


def test_a_wrong_mapping_names_the_nearest_column(write_jsonl: Write) -> None:
    path = write_jsonl({"question": "q", "answer": "a"})
    error = refusal(path, columns={"prompt": "qestion", "completion": "answer"})
    assert error.code == "DATA_COLUMN_MISSING"
    assert error.fix == "did you mean `question`?"


def test_a_named_format_without_its_columns_is_refused(write_jsonl: Write) -> None:
    error = refusal(write_jsonl(*PAIRS), format="messages")
    assert error.code == "DATA_COLUMN_MISSING"
    assert "'messages'" in error.what


def test_preference_pairs_are_named(write_jsonl: Write) -> None:
    assert "preference pairs" in refusal(write_jsonl({"prompt": "q", "chosen": "a", "rejected": "b"})).what


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("a.json", "[]"), ("a.json", " "), ("a.csv", "text\n")])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert refusal(tmp_path / name).code == "DATA_EMPTY"


def test_a_missing_file_names_the_nearest_one(write_jsonl: Write, tmp_path: Path) -> None:
    write_jsonl(*PAIRS)
    error = refusal(tmp_path / "trian.jsonl")
    assert (error.code, error.fix) == ("DATA_NOT_FOUND", "did you mean `train.jsonl`?")


def test_a_folder_without_data_and_an_unknown_suffix_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).code == "DATA_NOT_FOUND"
    (tmp_path / "train.xlsx").write_text("x")
    assert refusal(tmp_path / "train.xlsx").code == "DATA_FORMAT_UNKNOWN"


def test_a_single_file_has_no_splits(write_jsonl: Write) -> None:
    assert refusal(write_jsonl(*PAIRS), split="test").code == "DATA_NOT_FOUND"


def test_an_unreadable_file_is_refused(write_jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(*PAIRS)

    def deny(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    error = refusal(path)
    assert error.code == "DATA_NOT_FOUND"
    assert "Permission denied" in error.what


def test_what_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 SECRET")
    error = refusal(tmp_path / "train.parquet")
    assert error.code == "DATA_BROKEN_LINE"
    assert "SECRET" not in str(error)


def test_a_damaged_saved_data_set_is_refused(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "one")
    for arrow in (tmp_path / "one").glob("*.arrow"):
        arrow.unlink()
    assert refusal(tmp_path / "one").code == "DATA_BROKEN_LINE"


def test_a_hub_that_cannot_be_reached_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error = refusal("some-org/adverts")
    assert error.code == "DATA_NOT_FOUND"
    assert "ConnectionError" in error.what


@pytest.mark.parametrize(
    "source",
    ["nothing", "./x/y", "/a/b/c", "org/train.jsonl", "bad\0name", "x" * 5000, "a/b/c", "tmp/trian", "~nobody/x"],
)
def test_what_can_be_no_hub_id_is_never_asked_of_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("asked the hub"))
    assert refusal(source).code == "DATA_NOT_FOUND"
