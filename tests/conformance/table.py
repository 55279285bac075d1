"""Write docs/reference/methods.md: which method goes with which family and task, from what the code refuses.

python tests/conformance/table.py          writes the page
python tests/conformance/table.py --check  exits with 1 when it differs
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
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    parts.append(
        "## Why a pair is refused\n\nBefore anything is loaded, with the code `PEFT_TARGET`:\n\n"
        + "\n".join(notes)
        + "\n"
    )
    return "\n".join(parts)


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
    made = page()
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != made)
    PAGE.write_text(made, encoding="utf-8")
