"""The reference pages that are made from the code: every option, key and default is frozen in them."""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import make_reference  # noqa: E402

KINDS = ("job", "party", "project")
NAMES = ("cli.md", "python-api.md", *(f"{kind}{end}" for kind in KINDS for end in ("-file.md", ".schema.json")))


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return {path.name: text for path, text in make_reference.pages().items()}


@pytest.mark.parametrize("name", NAMES)
def test_page_is_up_to_date(made: dict[str, str], name: str) -> None:
    page = ROOT / "docs" / "reference" / name
    assert page.read_text(encoding="utf-8") == made[name], "run `make reference` and look at the difference"


def test_all_pages_are_held(made: dict[str, str]) -> None:
    assert sorted(made) == sorted(NAMES)


def all_commands() -> list[tuple[str, Any]]:
    import typer

    from fedllm.cli import app

    return list(make_reference.commands(typer.main.get_command(app)))


@pytest.mark.parametrize(("name", "command"), all_commands(), ids=[name for name, _ in all_commands()])
def test_every_command_has_help_and_a_section(made: dict[str, str], name: str, command: Any) -> None:
    assert command.help and command.help.strip().endswith(".")
    assert [parameter.name for parameter in command.params if not parameter.help] == []
    assert f"\n## fedllm {name}\n" in made["cli.md"]


@pytest.mark.parametrize(("name", "command"), all_commands(), ids=[name for name, _ in all_commands()])
def test_every_command_but_schema_has_json(name: str, command: Any) -> None:
    # `schema` prints JSON and nothing else.
    assert any("--json" in parameter.opts for parameter in command.params) == (name != "schema")


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_a_description(kind: str) -> None:
    from fedllm.job.schema import json_schema

    schema = json_schema(kind)
    sections = [("", schema), *make_reference.sections(schema, schema, "")]
    lacking = [
        f"{title}.{key}"
        for title, section in sections
        for key, item in section["properties"].items()
        if not item.get("description")
    ]
    assert lacking == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_schema_is_the_published_one(
    capsys: pytest.CaptureFixture[str], made: dict[str, str], kind: str
) -> None:
    from fedllm.cli.schema import Kind, schema

    schema(Kind(kind))
    assert capsys.readouterr().out == made[f"{kind}.schema.json"]
