"""FedHomoLLM's metrics: what the sums of a round say, as rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedllm.evaluate.loss import LossSums
from fedllm.scenarios.base import Row, Total
from fedllm.scenarios.fedhomollm_private import SPENT


def loss_sums(total: Total) -> LossSums:
    """Return the sums of an evaluation over all parties.

    Args:
        total: The answers' sum.
    """
    counts = total.counts
    return LossSums(
        counts.get("nll_nats", 0.0),
        round(counts.get("tokens", 0)),
        round(counts.get("bytes", 0)),
        round(counts.get("examples", 0)),
        round(counts.get("choices", 0)),
        round(counts.get("correct", 0)),
    )


def loss_rows(number: int, split: str, total: Total) -> list[Row]:
    """Return an evaluation's rows; none where nothing was evaluated.

    Args:
        number: The round.
        split: On what.
        total: The answers' sum.
    """
    return rows_of(number, None, split, loss_sums(total).values()) if loss_sums(total).tokens else []


def train_rows(number: int, total: Total) -> list[Row]:
    """Return the rows of a round of training.

    Args:
        number: The round.
        total: The answers' sum; its means are the mean update.
    """
    # What a party forgets to count must not stop the server: its rows are null then.
    values = {name: total.counts.get(name) for name in ("tokens", "examples", "steps")}
    loss, tokens = total.counts.get("loss_nats"), values["tokens"]
    values["loss_nats"] = loss / tokens if loss is not None and tokens else None
    spent = {party: total.counts.get(SPENT + party) for party in total.parties}
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in total.means.values()))
    rows = rows_of(number, None, "train", values) + rows_of(number, None, None, {"update_norm": norm})
    for party, value in spent.items():
        rows += [] if value is None else rows_of(number, party, None, {"epsilon_spent": value})
    return rows


def rows_of(number: int, party: str | None, split: str | None, values: Mapping[str, float | None]) -> list[Row]:
    """Return metric rows, one per value.

    Args:
        number: The round.
        party: Whose they are; None for the federation's.
        split: `train`, `held_out`, `common` or None.
        values: Metrics by name.
    """
    head: dict[str, Any] = {"round": number, "party": party, "split": split}
    return [head | {"name": name, "value": value} for name, value in values.items()]
