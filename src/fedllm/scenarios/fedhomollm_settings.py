"""FedHomoLLM's settings, and what cannot be asked together of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from fedllm.aggregate.lora import LoraRule
from fedllm.aggregate.robust import COORDINATEWISE, RobustSettings
from fedllm.aggregate.server import StrategySettings
from fedllm.models.settings import PeftSettings
from fedllm.scenarios.base import ScenarioSettings
from fedllm.train.settings import TrainSettings
from fedllm.wire.codecs import CodecSettings


class Settings(ScenarioSettings):
    """The job's `federation` section for FedHomoLLM."""

    strategy: StrategySettings = Field(StrategySettings(), description="The server's optimiser.")
    lora_rule: LoraRule = Field(
        "FedIT",
        description="LoRA: average both factors (FedIT), only B (FFA-LoRA), B and A in turns (RoLoRA), or the products "
        "(FlexLoRA).",
    )
    robust: RobustSettings = Field(RobustSettings(), description="What bears dishonest parties.")
    codec: CodecSettings = Field(CodecSettings(), description="How updates are encoded on their way up.")
    drift_meter: bool = Field(
        True, description="Measure how far the mean of LoRA's factors is from the mean of their products (FedIT)."
    )
    weight_by: Literal["examples", "tokens", "equal"] = Field(
        "examples", description="A party's weight in the mean: its training examples, its target tokens, or 1."
    )
    eval_every: int = Field(1, ge=0, description="Evaluate the global adapter every so many rounds; 0 = never.")
    keep: Literal["best", "last"] = Field(
        "best", description="Deliver the round of lowest held-out loss (where held-out data exist), or the last."
    )


def needs_each(settings: Settings) -> bool:
    """Return whether the server must see each party's update; a sum of them is enough otherwise."""
    return settings.robust.name != "none" or settings.lora_rule == "FlexLoRA"


def clashes(
    settings: Settings, train: TrainSettings, peft: PeftSettings, parties: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    """Yield what cannot be asked together, as (key, what, fix).

    Args:
        settings: The scenario's.
        train: The job's `train` section.
        peft: Its `peft` section.
        parties: Its parties.
    """
    strategy, robust = settings.strategy, settings.robust
    if strategy.name == "SCAFFOLD" and train.optim != "sgd":
        what = f"SCAFFOLD's control variates are mean gradients under plain SGD only, not under {train.optim} (E17)"
        yield "train.optim", what, "set `optim: sgd` (with a higher learning_rate), or another `federation.strategy`"
    if strategy.name == "SCAFFOLD" and needs_each(settings):
        what = "SCAFFOLD's control variates are means, which the rule that looks at each update does not make"
        yield "federation.strategy", what, "set another `strategy`, or leave `robust` and FlexLoRA out"
    if strategy.name == "SCAFFOLD" and settings.codec.name != "fp32":
        what = f"control variates must arrive whole, not as {settings.codec.name}, or their mean is not the server's"
        yield "federation.codec", what, "set `codec: {name: fp32}`, or another `strategy`"
    if settings.lora_rule == "FlexLoRA":
        yield from _clashes_of_flexlora(settings, train, peft)
    yield from _clashes_of_robust(settings, parties)
    if robust.name in COORDINATEWISE and settings.lora_rule == "FedIT":
        what = f"{robust.name} compares coordinates, and LoRA's product has none in common while both factors move"
        yield "federation.robust", what, "set `lora_rule: RoLoRA` or FFA-LoRA, or a rule such as MultiKrum"


def _clashes_of_flexlora(
    settings: Settings, train: TrainSettings, peft: PeftSettings
) -> Iterator[tuple[str, str, str]]:
    key, new = "federation.lora_rule", "FlexLoRA takes new axes for the factors in every round"
    plain = settings.strategy.name in ("FedAvg", "FedProx") and settings.strategy.server_learning_rate == 1
    if not plain:
        what = f"{new}, so a server's momentum or step size has no meaning"
        yield key, what, "set `strategy: {name: FedAvg}`, or another `lora_rule`"
    if train.optim != "sgd" and train.optimizer_state == "keep":
        what = f"{new}, so what {train.optim} remembers of the last one does not fit"
        yield key, what, "set `train.optimizer_state: reset`"
    if settings.robust.name != "none":
        what = f"FlexLoRA and {settings.robust.name} would both take the mean's place"
        yield key, what, "set another `lora_rule`, or leave `robust` out"
    if settings.codec.error_feedback:
        what = f"{new}, so what a codec lost of the last update does not fit"
        yield key, what, "set `codec.error_feedback: false`"
    if peft.use_dora:
        yield key, "with DoRA the model is not linear in the product that FlexLoRA keeps", "set `use_dora: false`"


def _clashes_of_robust(settings: Settings, parties: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    robust, least = settings.robust, settings.robust.least_parties()
    if settings.min_parties < least:
        bears = f" to bear {robust.num_malicious} of them" if robust.num_malicious else ""
        what = f"{robust.name} needs {least} answers{bears}, and min_parties is {settings.min_parties} (E21)"
        yield "federation.min_parties", what, f"set `min_parties` to {least} or more, or lower num_malicious"
    if robust.root_party is not None and robust.root_party not in parties:
        yield "federation.robust", f"the root party {robust.root_party!r} is no party of the job", "name one of them"
    if robust.root_party is not None and settings.fraction_train < 1:
        what = "FLTrust needs its root party in every round, and fraction_train draws some of the parties"
        yield "federation.fraction_train", what, "set `fraction_train: 1.0`"
