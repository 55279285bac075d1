"""The owner's `emulator` section in party.yaml: the whole model, how its emulator is made, and when it may leave."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Way = Literal["uniform", "influence", "crash", "whole"]
Storage = Literal["float32", "int8", "int4"]


class ExportPolicy(BaseModel):
    """How good an emulator may be. All losses are in nats per target, on the held-out part of the owner's probe set."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    check_steps: int = Field(100, ge=1, description="Steps of each tuning that the check does on the probe set.")
    full_zs_margin: float = Field(
        0.0, description="The emulator as it is must be worse than the whole model as it is, by more than this."
    )
    plug_margin: float = Field(
        0.0, description="The tuned emulator must be worse than the plugged model, by more than this."
    )
    gain_margin: float = Field(
        0.0, description="The plugged model must be better than the whole model as it was, by more than this."
    )
    thief_margin: float = Field(
        0.0, description="What a thief makes of the package must be worse than the plugged model, by more than this."
    )
    thief_budgets: list[int] = Field(
        default_factory=lambda: [1, 10],
        min_length=1,
        description="How many times `check_steps`, and the owner's own distillation, the thief works.",
    )
    thief_asks_model: bool = Field(
        True,
        description="Whether a thief can ask the whole model for its logits on public text, as users of a service can; "
        "else it learns from that text alone.",
    )
    thief_learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of the thief, who tunes all layers.")


class EmulatorSettings(BaseModel):
    """What only the owner of the model has in its party.yaml. It is never sent and never a part of the job."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    full_model_name_or_path: str = Field(
        min_length=1, description="Folder (relative to party.yaml) or hub id of the whole model. It stays here."
    )
    bottom: int = Field(2, ge=0, description="The first so many blocks are adapter layers: others get and tune them.")
    top: int = Field(2, ge=1, description="The last so many blocks are adapter layers too.")
    middle: int | None = Field(
        None, ge=1, description="Blocks that are kept of the middle; null: half of them, rounded up."
    )
    way: Way = Field(
        "uniform",
        description="Which blocks are kept: evenly spaced (uniform, Offsite-Tuning), the most influential (influence, "
        "ShortGPT), one of each cluster of like blocks, repeated in the places of the others (crash, CRaSh), or all.",
    )
    storage: Storage = Field("float32", description="How the matrices of the emulated middle are stored and sent.")
    public: str | None = Field(
        None, description="Public text to measure blocks and to distil on: a data file, relative to party.yaml."
    )
    distil_steps: int = Field(0, ge=0, description="Steps of distillation from the whole model; 0: none.")
    distil_learning_rate: float = Field(1e-3, gt=0, description="Its peak learning rate; cosine to 0.")
    distil_batch_size: int = Field(16, ge=1, description="Examples per step of distillation.")
    hidden_weight: float = Field(3.0, ge=0, description="Weight of the loss on hidden states in distillation.")
    logit_weight: float = Field(1.0, ge=0, description="Weight of the loss on logits in distillation.")
    policy: ExportPolicy = Field(ExportPolicy(), description="When the package may be written.")

    @model_validator(mode="after")
    def _public_text(self) -> EmulatorSettings:
        if self.public is None and (self.distil_steps or self.way in ("influence", "crash")):
            raise ValueError(
                "distil_steps, and the ways influence and crash, need `public`; name a file of public text"
            )
        if self.public is not None and not self.hidden_weight + self.logit_weight:
            raise ValueError("hidden_weight and logit_weight are both 0; one of them must be above")
        return self

    @model_validator(mode="after")
    def _middle_has_an_effect(self) -> EmulatorSettings:
        if self.way == "whole" and self.middle is not None:
            raise ValueError("middle has no effect with `way: whole`; leave it out")
        return self
