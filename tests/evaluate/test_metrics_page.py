"""docs/reference/metrics.md: its example runs, and it names every score."""

import re
from dataclasses import fields
from pathlib import Path

from fedllm.evaluate.loss import LossSums
from fedllm.evaluate.text_metrics import ROUGE_TOKENIZER, TextScores

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(example, "metrics.md", "exec"), {})  # noqa: S102 - our own page


def test_every_score_is_defined() -> None:
    names = [*(field.name for field in fields(TextScores)), *LossSums().values(), ROUGE_TOKENIZER]
    assert [name for name in names if f"`{name}`" not in PAGE] == []
