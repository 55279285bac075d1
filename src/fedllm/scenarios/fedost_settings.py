"""FedOST's settings, and what cannot be asked together of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from fedllm.models.settings import MERGING_TYPES, PROMPT_TYPES, PeftSettings
from fedllm.privacy.settings import PrivacySettings
from fedllm.scenarios.base import Clash
from fedllm.scenarios.fedhomollm_clashes import clashes as clashes_of_averaging
from fedllm.scenarios.fedhomollm_settings import Settings as AveragingSettings
from fedllm.scenarios.fedhomollm_settings import rule_of
from fedllm.train.settings import TrainSettings


class Settings(AveragingSettings):
    """The job's `federation` section for FedOST: that of FedHomoLLM, and what is the owner's."""

    owner: str = Field(
        description="The party that owns the whole model. It does not train; its data are its probe set."
    )
    plug_every: int = Field(
        1, ge=0, description="The owner plugs the global adapter in every so many rounds, and at the end; 0: never."
    )
    deliver_to_owner: Literal["model", "adapter", "nothing"] = Field(
        "model", description="What the owner gets: the whole tuned model, its tuned outer layers alone, or nothing."
    )
    deliver_to_clients: Literal["adapter", "service", "nothing"] = Field(
        "adapter",
        description="What the other parties get: the adapter for their emulator, the use of the owner's model as a "
        "service (nothing is written at them), or nothing.",
    )


def trainers(settings: Settings, parties: Sequence[str]) -> tuple[str, ...]:
    """Return the parties that train: all but the owner.

    Args:
        settings: The scenario's.
        parties: The job's.
    """
    return tuple(party for party in parties if party != settings.owner)


def clashes(
    settings: Settings, train: TrainSettings, peft: PeftSettings, privacy: PrivacySettings, parties: Sequence[str]
) -> Iterator[Clash]:
    """Yield what cannot be asked together, as (key, what, fix).

    Args:
        settings: The scenario's.
        train: The job's `train` section.
        peft: Its `peft` section.
        privacy: Its `privacy` section.
        parties: Its parties.
    """
    if settings.owner not in parties:
        yield "federation.owner", f"{settings.owner!r} is no party of the job", f"name one of: {', '.join(parties)}"
    yield from clashes_of_averaging(settings, train, peft, privacy, trainers(settings, parties))
    if rule_of(settings).folds or rule_of(settings).keeps_state:
        what = f"{settings.lora_rule} leaves more behind, or at parties, than the tensors that are plugged in (E20)"
        yield "federation.lora_rule", what, "set `lora_rule: FedIT`, FFA-LoRA, RoLoRA or FlexLoRA"
    if settings.robust.root_party == settings.owner:
        what = "the owner does not train, so its update cannot be the one that is trusted"
        yield "federation.robust", what, "name another root party"
    yield from _clashes_of_delivery(settings, peft)
    if peft.peft_type in PROMPT_TYPES:
        what = f"{peft.peft_type} works on the whole model, and only an emulator's outer layers may be tuned"
        yield "peft.peft_type", what, "set LORA, or another method that changes layers"
    if peft.modules_to_save:
        what = "`modules_to_save` are modules of the whole model, and only an emulator's outer layers may be tuned"
        yield "peft.modules_to_save", what, "leave it out"


def _clashes_of_delivery(settings: Settings, peft: PeftSettings) -> Iterator[Clash]:
    key = "federation.deliver_to_owner"
    if settings.deliver_to_owner == "model" and peft.peft_type not in MERGING_TYPES:
        what = f"what {peft.peft_type} adds cannot be written into the whole model's weights"
        yield key, what, "set `deliver_to_owner: adapter`, or another `peft_type`"
    if settings.deliver_to_clients == "service" and settings.deliver_to_owner != "model":
        what = f"the owner gets {settings.deliver_to_owner}, and has no tuned model to serve"
        yield key, what, "set `deliver_to_owner: model`"
    if settings.deliver_to_owner == "nothing" and settings.deliver_to_clients == "nothing":
        yield key, "nobody would get anything of the run", "set `deliver_to_owner: model`"
