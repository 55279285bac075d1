"""The job's public `ownership` section, and the party's own one, which stays at the party."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Carrier = Literal["none", "product", "norms"]


class OwnershipSettings(BaseModel):
    """Who marks the model, and with what. Keys, bits and triggers stay at the parties."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    carrier: Carrier = Field(
        "none",
        description="Where bits are hidden: in the product of LoRA's factors (product), in the norms' scales (norms), "
        "or nowhere.",
    )
    num_bits: int = Field(32, ge=8, le=1024, description="Bits of each claimant.")
    strength: float = Field(
        0.2, gt=0, le=1, description="Share of what a bit lacks that each step of training makes up for."
    )
    margin: float = Field(
        0.1,
        gt=0,
        description="How far on its side of zero each bit is held, beside four standard deviations of what a random "
        "key reads; in units of the change of a weight.",
    )
    threshold: float = Field(
        1e-6, gt=0, le=0.01, description="Largest p-value of a claim that holds, after Bonferroni's correction."
    )
    num_triggers: int = Field(
        0, ge=0, le=64, description="Secret prompts with secret answers that each claimant trains in; 0: none."
    )
    trigger_strength: float = Field(
        0.3, gt=0, description="Largest norm of the gradient by which a step of a claimant learns them."
    )
    trace: Literal["none", "delivered"] = Field(
        "none",
        description="`delivered`: each party gets a copy of the adapter with a mark of its own, by which a leak is "
        "traced.",
    )
    trace_strength: float = Field(0.05, gt=0, le=0.5, description="Size of that mark beside LoRA's factor B.")
    claimants: list[str] = Field(
        default_factory=list,
        description="Parties that claim the model; each commits with `fedllm ownership commit` before the run.",
    )

    @model_validator(mode="after")
    def _claimants_differ(self) -> OwnershipSettings:
        if len(set(self.claimants)) < len(self.claimants):
            raise ValueError("a claimant is named twice; name each once")
        return self

    @model_validator(mode="after")
    def _settings_have_effect(self) -> OwnershipSettings:
        fields = type(self).model_fields
        of_marks = ("num_bits", "strength", "margin")
        if self.carrier == "none":
            # Compared with the defaults, not with what was written: a run folder writes all values out.
            changed = [name for name in of_marks if getattr(self, name) != fields[name].default]
            if changed:
                raise ValueError(f"{', '.join(changed)} has no effect without a carrier; set `carrier: product`")
            if self.claimants and not self.num_triggers:
                raise ValueError("claimants without a carrier or triggers claim nothing; set `carrier: product`")
        elif not self.claimants:
            raise ValueError("a carrier without claimants marks nothing; name `claimants`, or leave `carrier` out")
        return self

    @model_validator(mode="after")
    def _texts_have_effect(self) -> OwnershipSettings:
        fields = type(self).model_fields
        if self.num_triggers and not self.claimants:
            raise ValueError("triggers without claimants are nobody's; name `claimants`, or leave `num_triggers` out")
        if not self.num_triggers and self.trigger_strength != fields["trigger_strength"].default:
            raise ValueError("trigger_strength has no effect without num_triggers")
        if self.num_triggers == 1:
            raise ValueError("one trigger proves too little: two answers at least must come; set `num_triggers: 8`")
        if self.trace == "none" and self.trace_strength != fields["trace_strength"].default:
            raise ValueError("trace_strength has no effect without trace; set `trace: delivered`")
        return self

    @property
    def enabled(self) -> bool:
        """Whether anyone claims the model."""
        return bool(self.claimants)


class PartyOwnership(BaseModel):
    """The party's own section: where its key and its claims are. Nothing in that folder is ever sent."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    folder: str | None = Field(
        None,
        min_length=1,
        description="Folder of the party's signing key and claims, relative to this file; null: `ownership-NAME` "
        "beside it.",
    )
