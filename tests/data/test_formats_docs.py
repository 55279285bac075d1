from __future__ import annotations

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from fedllm.data.formats import LAYOUTS, MEANINGFUL_COLUMNS, MEANINGFUL_MESSAGE_KEYS, ROLES, ColumnMap
from fedllm.data.read import read_examples, scan_source
from fedllm.data.settings import DataSource
from fedllm.tasks import TaskName

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "data-formats.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^#+ ", TEXT, flags=re.MULTILINE)}


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], flags=re.DOTALL)


def test_every_layout_has_a_section_with_an_example() -> None:
    assert all(blocks(layout, "json") for layout in LAYOUTS)


@pytest.mark.parametrize(
    ("layout", "block"), [(layout, block) for layout in LAYOUTS for block in blocks(layout, "json")]
)
def test_every_example_is_read_as_the_layout_of_its_section(layout: str, block: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(block, encoding="utf-8")
    task: TaskName = "sequence_classification" if layout == "classification" else "causal_lm"
    scan = scan_source("train.jsonl", base_dir=tmp_path, split=None, column_map=ColumnMap(task=task))
    assert (scan.layout, scan.refusals, scan.unused) == (layout, (), ())


def test_the_mapping_of_the_page_fits_its_example(tmp_path: Path) -> None:
    (record,) = blocks("Columns with other names", "json")
    (mapping,) = blocks("Columns with other names", "yaml")
    source = DataSource.model_validate(YAML(typ="safe", pure=True).load(mapping)["data"])
    (tmp_path / "data").mkdir()
    (tmp_path / source.train).write_text(record, encoding="utf-8")
    (example,) = read_examples(source.train, base_dir=tmp_path, columns=source.columns)
    assert example.completion == "A red dress for every day."


def test_the_joined_prompt_of_the_page_is_the_real_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(blocks("instruction", "json")[0], encoding="utf-8")
    (example,) = read_examples("train.jsonl", base_dir=tmp_path)
    # Headings in the block were split off as if they were the page's, so look at the page as a whole.
    assert example.prompt is not None
    assert f"```text\n{example.prompt}```" in TEXT


def test_the_page_names_every_role_and_every_refused_key() -> None:
    for word in (*ROLES, *MEANINGFUL_COLUMNS, *MEANINGFUL_MESSAGE_KEYS):
        assert f"`{word}`" in TEXT
