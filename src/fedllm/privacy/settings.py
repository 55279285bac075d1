"""The job's `privacy` section: what is protected in training, and how."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from fedllm.privacy.differential import DifferentialPrivacySettings


class SecureAggregationSettings(BaseModel):
    """Whether the server sees only sums of what parties send."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    enabled: bool = Field(False, description="Mask what parties send, so that the server can open the sum alone.")
    threshold: int | None = Field(
        None,
        ge=2,
        description="Parties that must stay to the end of a sum; of n parties 2n/3, rounded down, and one more.",
    )
    max_weight: int = Field(
        1000, ge=1, le=2**20, description="The largest weight of a party; with `weight_by: equal` it is 1."
    )


class PrivacySettings(BaseModel):
    """The job's `privacy` section."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    secure_aggregation: SecureAggregationSettings = Field(
        SecureAggregationSettings(), description="Sums of which the server sees no part."
    )
    differential_privacy: DifferentialPrivacySettings = Field(
        DifferentialPrivacySettings(), description="Noise that hides single examples or persons."
    )
