"""YAML 1.2 without surprises: what words mean, on which line they stand, and what is refused."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from fedllm.errors import ConfigError
from fedllm.job.yaml_file import YamlFile, plain_value, read_yaml


def read(folder: Path, text: str | bytes) -> YamlFile:
    path = folder / "file.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(path)


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        ("3e-5", 3e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.1", -0.1),
        ("+7", 7),
        ("0777", 777),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("", None),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        (".nan", ".nan"),
        ("nan", "nan"),
        (".inf", ".inf"),
        ("1e", "1e"),
        ("1e999", "1e999"),
        ("e5", "e5"),
        ("0x1f", "0x1f"),
        ("1.2.3", "1.2.3"),
        ("١٢", "١٢"),
    ],
)
def test_a_plain_word_means_what_yaml_1_2_says(word: str, meaning: Any, tmp_path: Path) -> None:
    for found in (plain_value(word), read(tmp_path, f"key: {word}\n").values["key"]):
        assert (type(found), found) == (type(meaning), meaning)


def test_quoted_and_block_words_are_strings(tmp_path: Path) -> None:
    found = read(tmp_path, "a: '1'\nb: \"true\"\nc: |\n  3\nd: >-\n  null\n").values
    assert found == {"a": "1", "b": "true", "c": "3\n", "d": "null"}


def test_an_endless_number_is_a_word_and_not_a_crash(tmp_path: Path) -> None:
    digits = "9" * 5000
    assert read(tmp_path, f"seed: {digits}\n").values == {"seed": digits}


TEXT = "# comment\nname: x\n\ntrain:\n  lr: 1\n  list:\n    - a\n    - b: 2\n      c: 3\n"
TEXT += "  flow: {d: 4, e: [5,\n    6]}\n"
LINES = {
    ("name",): 2,
    ("train",): 4,
    ("train", "lr"): 5,
    ("train", "list"): 6,
    ("train", "list", 0): 7,
    ("train", "list", 1): 8,
    ("train", "list", 1, "b"): 8,
    ("train", "list", 1, "c"): 9,
    ("train", "flow"): 10,
    ("train", "flow", "d"): 10,
    ("train", "flow", "e"): 10,
    ("train", "flow", "e", 0): 10,
    ("train", "flow", "e", 1): 11,
}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_are_those_of_the_file_with_any_line_end_and_with_a_byte_order_mark(
    end: str, mark: bytes, tmp_path: Path
) -> None:
    file = read(tmp_path, mark + TEXT.replace("\n", end).encode())
    assert file.lines == LINES
    assert file.values["train"]["flow"] == {"d": 4, "e": [5, 6]}
    assert file.where(("train", "nothing", "here")) == f"{file.path}:4"
    assert file.where(("nothing",)) == f"{file.path}:1"


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "DUPLICATE_KEY", 3),
        ("x:\n  a: 1\n  'a': 2\n", "DUPLICATE_KEY", 3),
        ("x: {a: 1, a: 2}\n", "DUPLICATE_KEY", 1),
        ("a: 1\nb: !!python/object/apply:os.system ['true']\n", "BAD_YAML", 2),
        ("a: !!str 3\n", "BAD_YAML", 1),
        ("!!map {a: 1}\n", "BAD_YAML", 1),
        ("a: ! x\n", "BAD_YAML", 1),
        ("a: &x 1\nb: *x\n", "BAD_YAML", 1),
        ("a: [&x [1], *x]\n", "BAD_YAML", 1),
        ("a:\n  <<: *x\n", "BAD_YAML", 2),
        ("a: 1\n---\nb: 2\n", "BAD_YAML", 2),
        ("a: 1\n\tb: 2\n", "BAD_YAML", 2),
        ("a: [1, 2\nb: 3\n", "BAD_YAML", 2),
        ("a: 1\n b: 2\n", "BAD_YAML", 2),
        ("a: 'unclosed\n", "BAD_YAML", None),
        ("a: @x\n", "BAD_YAML", 1),
        ("a: 1\nb: \x00\n", "BAD_YAML", 2),
        ("? [a, b]\n: 1\n", "BAD_YAML", 1),
        ("- a\n- b\n", "BAD_YAML", 1),
        ("word\n", "BAD_YAML", 1),
        ("", "BAD_YAML", 1),
        ("# nothing\n", "BAD_YAML", 1),
        ("a:\n" + "".join("  " * i + "a:\n" for i in range(1, 30)), "BAD_YAML", 21),
    ],
)
def test_what_is_refused_names_its_line_and_the_mend(text: str, code: str, line: int | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert caught.value.code == code
    assert caught.value.fix
    file, _, found = caught.value.where.rpartition(":")
    assert file == str(tmp_path / "file.yaml")
    assert line is None or int(found) == line


@pytest.mark.parametrize(
    "data",
    [
        "a: 1\n".encode("utf-16"),
        b"a: \xff\n",
        b"x" * 2**21,
    ],
)
def test_a_file_that_is_no_text_or_too_large_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, data)
    assert (caught.value.code, caught.value.where) == ("BAD_YAML", str(tmp_path / "file.yaml"))
    assert caught.value.fix


@pytest.mark.parametrize("name", ["absent.yaml", "", "absent/job.yaml"])
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / name)
    assert caught.value.code == "FILE_NOT_FOUND"
    assert str(tmp_path) in caught.value.where


def cost(folder: Path, text: str) -> float:
    started = time.process_time()
    try:
        read(folder, text)
    except ConfigError as error:
        assert error.code == "BAD_YAML"
    return time.process_time() - started


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What a long file of a few keys a section costs; the first one would load the library."""
    text = "".join(f"section{i}:\n  key: {i}\n  other: {i}\n" for i in range(5_000))
    folder = tmp_path_factory.mktemp("honest")
    return [cost(folder, text) for _ in range(2)][1]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        "a: " + "[" * 10_000,
        "".join(" " * i + "a:\n" for i in range(600)),
        "a: [" + "1," * 100_000 + "1]",
        "".join(f"k{i}: {i}\n" for i in range(20_000)),
        "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n",
        "a: " + "x" * 200_000,
        "#" * 250_000,
    ],
)
def test_hostile_files_cost_little_more_than_an_honest_one(text: str, honest: float, tmp_path: Path) -> None:
    assert cost(tmp_path, text) < 10 * honest


plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=12)
trees = st.recursive(
    plain | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@given(values=st.dictionaries(words, trees, min_size=1, max_size=4))
@settings(max_examples=150)
def test_what_the_run_folder_writes_is_read_back_with_the_same_types(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    yaml, text = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.dump(values, text)
    found = read(tmp_path_factory.getbasetemp(), text.getvalue()).values
    assert json.dumps(found, sort_keys=True) == json.dumps(values, sort_keys=True)
