from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.data import files
from fedllm.data.formats import ColumnMap, Example
from fedllm.data.read import read_examples, read_party_data, scan_source, split_held_out
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


@settings(max_examples=40, deadline=None)
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


@pytest.mark.parametrize("source", ["nothing", "./x/y", "/a/b/c", "org/train.jsonl", "bad\0name", "x" * 5000, "a/b/c"])
def test_what_can_be_no_hub_id_is_never_asked_of_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("asked the hub"))
    assert refusal(source).code == "DATA_NOT_FOUND"


@settings(deadline=None)  # the first call imports torch
@given(
    st.lists(st.integers(0, 12), max_size=60).map(lambda ids: [0, *ids, 1]),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_equal_examples_stay_together_and_both_sides_have_some(ids: list[int], share: float, seed: int) -> None:
    examples = [Example(text=f"text {i}") for i in ids]
    train, held_out = split_held_out(examples, share, seed=seed, party="north")
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    assert sorted(e.text or "" for e in train + held_out) == sorted(e.text or "" for e in examples)
    assert (train, held_out) == split_held_out(examples, share, seed=seed, party="north")


def test_the_share_is_met_without_duplicates_and_depends_on_seed_and_party() -> None:
    examples = [Example(text=f"text {i}") for i in range(200)]
    splits = [split_held_out(examples, 0.1, seed=s, party=p)[1] for s, p in ((0, "a"), (1, "a"), (0, "b"))]
    assert [len(held_out) for held_out in splits] == [20, 20, 20]
    assert len(set(splits)) == 3


def test_many_duplicates_of_one_example_do_not_swallow_the_training_side() -> None:
    examples = [Example(text="same")] * 90 + [Example(text=f"text {i}") for i in range(10)]
    for seed in range(20):
        train, held_out = split_held_out(examples, 0.1, seed=seed, party="north")
        assert len(held_out) == 10
        assert len(train) == 90


def test_share_zero_holds_out_nothing() -> None:
    assert split_held_out(EXAMPLES, 0, seed=0, party="north") == (EXAMPLES, ())


@pytest.mark.parametrize("examples", [(), EXAMPLES[:1], EXAMPLES[:1] * 5])
def test_too_few_different_examples_cannot_be_split(examples: tuple[Example, ...]) -> None:
    with pytest.raises(DataError, match="DATA_EMPTY"):
        split_held_out(examples, 0.1, seed=0, party="north")


def test_a_party_evaluates_on_its_share_its_file_or_its_split(write_jsonl: Write, tmp_path: Path) -> None:
    write_jsonl(*PAIRS)
    write_jsonl(PAIRS[0], name="eval.jsonl")

    def sizes(**source: Any) -> tuple[int, int]:
        data = read_party_data(DataSource(**source), base_dir=tmp_path, text_field="text", seed=0, party="north")
        return len(data.train), len(data.held_out)

    assert sizes(train="train.jsonl", eval_share=0.4) == (3, 2)
    assert sizes(train="train.jsonl", eval="eval.jsonl") == (5, 1)
    assert sizes(train="train.jsonl", eval_share=0) == (5, 0)
    assert sizes(train=".", eval_split="eval") == (5, 1)


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
