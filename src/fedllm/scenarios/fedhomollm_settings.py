"""FedHomoLLM's settings, and what follows from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedllm.aggregate.robust import RobustSettings
from fedllm.aggregate.rules import RULES, LoraRule, Rule
from fedllm.aggregate.server import StrategySettings
from fedllm.scenarios.base import ScenarioSettings
from fedllm.wire.codecs import CodecSettings
from fedllm.wire.patch import DownSettings


class Settings(ScenarioSettings):
    """The job's `federation` section for FedHomoLLM."""

    strategy: StrategySettings = Field(StrategySettings(), description="The server's optimiser.")
    lora_rule: LoraRule = Field(
        "FedIT",
        description="LoRA: average both factors (FedIT), only B (FFA-LoRA), B and A in turns (RoLoRA), only A while B "
        "stays at its party (FedSA-LoRA), or the products: cut to rank r (FlexLoRA), or exactly, by adding to the base "
        "(FedEx-LoRA, FLoRA).",
    )
    ranks: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="LoRA: rank of each party that has a lower one than `peft.r`, as in {north: 4}.",
    )
    robust: RobustSettings = Field(RobustSettings(), description="What bears dishonest parties.")
    codec: CodecSettings = Field(CodecSettings(), description="How updates are encoded on their way up.")
    codec_down: DownSettings = Field(
        DownSettings(), description="How the global adapter's change is encoded on its way down."
    )
    drift_meter: bool = Field(
        True, description="Measure how far the mean of LoRA's factors is from the mean of their products (FedIT)."
    )
    weight_by: Literal["examples", "tokens", "equal"] = Field(
        "examples", description="A party's weight in the mean: its training examples, its target tokens, or 1."
    )
    weight_unit: int = Field(
        1, ge=1, description="How many examples or tokens count as 1 in a weight, which is rounded up."
    )
    eval_every: int = Field(1, ge=0, description="Evaluate the global adapter every so many rounds; 0 = never.")
    keep: Literal["best", "last"] = Field(
        "best", description="Deliver the round of lowest held-out loss (where held-out data exist), or the last."
    )


def rule_of(settings: Settings) -> Rule:
    """Return what the rule for LoRA's factors does and needs.

    Args:
        settings: The scenario's.
    """
    return RULES[settings.lora_rule]


def needs_each(settings: Settings) -> bool:
    """Return whether the server must see each party's update; a sum of them is enough otherwise.

    Args:
        settings: The scenario's.
    """
    return settings.robust.name != "none" or rule_of(settings).needs_each


def meets_drift(settings: Settings) -> bool:
    """Return whether the drift of averaged factors is measured.

    With mixed ranks the mean of a slot is not meant to be the mean over all parties, so there is nothing to compare.

    Args:
        settings: The scenario's.
    """
    is_plain = settings.lora_rule == "FedIT" and not settings.ranks
    return settings.drift_meter and is_plain and not needs_each(settings)
