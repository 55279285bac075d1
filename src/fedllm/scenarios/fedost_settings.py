"""FedOST's settings, and what cannot be asked together of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field, model_validator

from fedllm.models.settings import MERGING_TYPES, PROMPT_TYPES, PeftSettings
from fedllm.privacy.settings import PrivacySettings
from fedllm.scenarios.base import Clash
from fedllm.scenarios.fedhomollm_clashes import clashes as clashes_of_averaging
from fedllm.scenarios.fedhomollm_settings import Settings as AveragingSettings
from fedllm.scenarios.fedhomollm_settings import rule_of
from fedllm.train.settings import TrainSettings

# Of a re-alignment, where the job does not say.
_STEPS, _RANK = 20, 4


class Settings(AveragingSettings):
    """The job's `federation` section for FedOST: that of FedHomoLLM, and what is the owner's."""

    owner: str = Field(
        description="The party that owns the whole model. It does not train; its data are its probe set."
    )
    plug_every: int = Field(
        1, ge=0, description="The owner plugs the global adapter in every so many rounds, and at the end; 0: never."
    )
    realign_every: int = Field(
        0,
        ge=0,
        description="Every so many rounds, but not after the last, the owner goes on distilling the emulator with the "
        "global adapter in both models (FedBiOT); 0: never.",
    )
    realign_steps: int | None = Field(
        None, ge=1, description="Steps of distillation each time, 20; how, the owner's party file says."
    )
    realign_rank: int | None = Field(
        None, ge=1, le=4096, description="Rank of the correction beside each linear layer of the emulator's middle, 4."
    )
    deliver_to_owner: Literal["model", "adapter", "nothing"] = Field(
        "model", description="What the owner gets: the whole tuned model, its tuned outer layers alone, or nothing."
    )
    deliver_to_clients: Literal["adapter", "service", "nothing"] = Field(
        "adapter",
        description="What the other parties get: the adapter for their emulator, the use of the owner's model as a "
        "service (nothing is written at them), or nothing.",
    )
    package: Literal["send", "copied"] = Field(
        "send",
        description="How the other parties get the package: from the owner, once, before round 0 and sealed for them "
        "(who has it is sent nothing); or it was copied to each site by hand.",
    )

    @model_validator(mode="after")
    def _realignment_has_an_effect(self) -> Settings:
        if not self.realign_every and (self.realign_steps or self.realign_rank):
            raise ValueError("realign_steps and realign_rank have no effect without realign_every; set it")
        return self

    @property
    def correction_rank(self) -> int:
        """Rank of the corrections of the emulator; 0: there are none."""
        return (self.realign_rank or _RANK) if self.realign_every else 0

    @property
    def correction_steps(self) -> int:
        """Steps of each re-alignment."""
        return self.realign_steps or _STEPS


def trainers(settings: Settings, parties: Sequence[str]) -> tuple[str, ...]:
    """Return the parties that train: all but the owner.

    Args:
        settings: The scenario's.
        parties: The job's.
    """
    return tuple(party for party in parties if party != settings.owner)


def sender(settings: Settings, parties: Sequence[str]) -> str | None:
    """Return who sends the package to the others; None where nobody does.

    Args:
        settings: The scenario's.
        parties: The job's; those of a yardstick are without the owner.
    """
    return settings.owner if settings.package == "send" and settings.owner in parties else None


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
    if settings.realign_every:
        yield from _clashes_of_realignment(settings, peft)
    if peft.peft_type in PROMPT_TYPES:
        what = f"{peft.peft_type} works on the whole model, and only an emulator's outer layers may be tuned"
        yield "peft.peft_type", what, "set LORA, or another method that changes layers"
    if peft.modules_to_save:
        what = "`modules_to_save` are modules of the whole model, and only an emulator's outer layers may be tuned"
        yield "peft.modules_to_save", what, "leave it out"


def _clashes_of_realignment(settings: Settings, peft: PeftSettings) -> Iterator[Clash]:
    key = "federation.realign_every"
    if peft.peft_type != "LORA":
        what = f"the emulator is corrected by a branch beside LoRA's, and with {peft.peft_type} there is none"
        yield key, what, "set `peft_type: LORA`, or leave `realign_every` out"
    if peft.use_dora:
        what = "with DoRA the delivered adapter would scale the corrected middle, too"
        yield "peft.use_dora", what, "set `use_dora: false`, or leave `realign_every` out"
    if settings.realign_every >= settings.num_rounds:
        what = f"the first re-alignment would come after round {settings.realign_every}, and no round would follow it"
        yield key, what, "lower `realign_every`, or leave it out"


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
