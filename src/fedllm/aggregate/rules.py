"""The rules for LoRA's factors: what each one does and needs, in one table from which settings are checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LoraRule = Literal["FedIT", "FFA-LoRA", "RoLoRA", "FedSA-LoRA", "FlexLoRA", "FedEx-LoRA", "FLoRA"]


@dataclass(frozen=True)
class Rule:
    """What a rule does and needs.

    `moves` and `exact` are words for the reader. `needs_each`: the server must see each party's update; a sum of them
    is enough otherwise. `new_axes`: the factors after a round are not a step away from those before it, so nothing that
    is remembered of one round fits the next. `folds`: it changes the base, beside the adapter. `keeps_state`: a party
    keeps a factor that nobody else has. `mixed_ranks`: parties may have different ranks.
    """

    moves: str
    exact: str
    needs_each: bool = False
    new_axes: bool = False
    folds: bool = False
    keeps_state: bool = False
    mixed_ranks: bool = True

    @property
    def starts_afresh(self) -> bool:
        """Whether each round begins with factors drawn from the seed: all that was learned is beside the adapter."""
        return self.folds and self.new_axes


RULES: dict[LoraRule, Rule] = {
    "FedIT": Rule("both factors", "no"),
    "FFA-LoRA": Rule("$B$ only; $A$ stays as the seed drew it, and never travels", "yes"),
    "RoLoRA": Rule("$B$ in odd rounds, $A$ in even ones", "yes"),
    "FedSA-LoRA": Rule(
        "both; $A$ is averaged, $B$ stays at its party", "each party has a model of its own", keeps_state=True
    ),
    "FlexLoRA": Rule("both factors", "up to rank $r$", needs_each=True, new_axes=True),
    "FedEx-LoRA": Rule("both factors", "yes", needs_each=True, folds=True, mixed_ranks=False),
    "FLoRA": Rule("both factors, drawn afresh each round", "yes", needs_each=True, new_axes=True, folds=True),
}


def rule_table() -> str:
    """Return the rules as a Markdown table, as it stands in the documentation."""
    head = "| `federation.lora_rule` | what moves | exact | the server needs | base | state at parties | mixed ranks |"
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- |"]
    for name, rule in RULES.items():
        cells = [
            f"`{name}`",
            rule.moves,
            rule.exact,
            "each update" if rule.needs_each else "their sum",
            "changes" if rule.folds else "stays",
            "a factor" if rule.keeps_state else "none",
            "yes" if rule.mixed_ranks else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
