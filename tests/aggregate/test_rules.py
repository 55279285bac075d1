"""The table of rules for LoRA's factors: the documentation shows it, and settings are checked by it."""

from pathlib import Path
from typing import get_args

from fedllm.aggregate.each import EACH
from fedllm.aggregate.rules import RULES, LoraRule, rule_table

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "fedavg-lora.md"


def test_the_page_shows_the_table() -> None:
    assert rule_table() in PAGE.read_text(encoding="utf-8"), f"put this into {PAGE.name}:\n\n{rule_table()}"


def test_every_rule_has_its_line() -> None:
    assert list(RULES) == list(get_args(LoraRule))


def test_what_needs_each_update_makes_something_of_them() -> None:
    assert {*EACH} == {name for name, rule in RULES.items() if rule.needs_each}
