"""Write docs/reference/methods.md: which method goes with which family and task, from what the code refuses.

    python tests/conformance/table.py

test_conformance.py compares its cells with the code.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "conformance")]

from combinations import METHODS, Combination
from families import TASKS, config_of

PAGE = TESTS.parent / "docs" / "reference" / "methods.md"
HEAD = Path(__file__).with_name("methods_head.md").read_text(encoding="utf-8")
_TITLES = {
    "causal_lm": "Causal language models (`data.task: causal_lm`)",
    "seq2seq_lm": "Encoders with a decoder (`data.task: seq2seq_lm`)",
    "sequence_classification": "Classifiers (`data.task: sequence_classification`)",
}


def page() -> str:
    """Return the page."""
    reasons: dict[str, int] = {}
    parts = [HEAD]
    with tempfile.TemporaryDirectory() as folder:
        for task, families in TASKS.items():
            rows = []
            for family in families:
                base = Path(folder) / f"{family}-{task}"
                config_of(family).save_pretrained(base)
                found = [Combination(method, family, task).refusal(base) for method in METHODS]
                rows.append([f"`{family}`", *(_cell(reason, family, reasons) for reason in found)])
            parts.append(f"## {_TITLES[task]}\n\n{_table(['family', *METHODS], rows)}")
    allowed = sum(part.count("✓") for part in parts[1:])
    total = sum(len(families) for families in TASKS.values()) * len(METHODS)
    parts.insert(1, f"Of {total} pairs {allowed} are allowed (✓); the others are refused, with the reason below.\n")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    parts.append(
        "## Why a pair is refused\n\nBefore anything is loaded, with the code `PEFT_TARGET`:\n\n"
        + "\n".join(notes)
        + "\n"
    )
    return "\n".join(parts)


def allowed_on_page() -> dict[Combination, bool]:
    """Return what the page says of each combination."""
    found: dict[Combination, bool] = {}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        task = next((name for name, title in _TITLES.items() if section.startswith(title)), None)
        for line in section.splitlines() if task else ():
            family, *cells = [cell.strip(" `") for cell in line.strip("| ").split("|")]
            if family in TASKS.get(task, ()):
                found |= {Combination(m, family, task): cell == "✓" for m, cell in zip(METHODS, cells, strict=True)}
    return found


def _cell(reason: str | None, family: str, reasons: dict[str, int]) -> str:
    if reason is None:
        return "✓"
    # A class is called after its family.
    general = " ".join(_general(word, family) for word in reason.split())
    return f"no: {reasons.setdefault(general, len(reasons) + 1)}"


def _general(word: str, family: str) -> str:
    is_name = word.split("'")[0] == family or word.endswith(("LM", "Classification", "Generation"))
    return (
        "the family" + word[len(family) :] if is_name and word.startswith(family) else "the model" if is_name else word
    )


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
