"""The job's `privacy.differential_privacy` section: whose traces noise hides, and how well."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedllm.privacy.accountant import AccountantName
from fedllm.variants import with_own

_NOISE: dict[str, Any] = {
    "epsilon": None,
    "noise_multiplier": None,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "accountant": "PLD",
}
# Which settings a unit has, and what they are where the job does not say.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "example": _NOISE,
    "group": _NOISE,
    "party": {**_NOISE, "placement": "central", "adaptive_clip": False, "colluders": None, "accountant": "RDP"},
}
# Above this the promise is that someone is exposed.
_LARGEST_DELTA = 0.01


class DifferentialPrivacySettings(BaseModel):
    """What of the training data can hardly be told from what is released."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    unit: Literal["none", "example", "group", "party"] = Field(
        "none", description="What is hidden: nothing, an example, all examples of a person (group), or of a party."
    )
    epsilon: float | None = Field(
        None, gt=0, description="The bound of the whole run; the noise follows. Give this or noise_multiplier."
    )
    noise_multiplier: float | None = Field(
        None, gt=0, description="Standard deviation of the noise in clip norms; epsilon follows."
    )
    delta: float | None = Field(
        None, gt=0, le=_LARGEST_DELTA, description="Chance that epsilon does not hold, 1e-5; well below 1/examples."
    )
    clip_norm: float | None = Field(None, gt=0, description="Largest norm of what one unit adds to a sum, 1.")
    accountant: AccountantName | None = Field(
        None, description="How the loss is added up: PLD, which is tight, or RDP, which is quick and above it."
    )

    placement: Literal["central", "distributed"] | None = Field(
        None,
        description="party: who adds the noise: the server, which is trusted with the sum (central), or each party its "
        "share before a secure sum (distributed).",
    )
    adaptive_clip: bool | None = Field(
        None, description="party, central: let clip_norm follow the median norm of the updates: no."
    )

    colluders: int | None = Field(
        None,
        ge=0,
        description="party, distributed: parties that may work together with the server and take their share of the "
        "noise away; that of the others is enough: 0.",
    )

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_unit(cls, values: Any) -> Any:
        return with_own(values, cls.model_fields, key="unit", default="none", variants=_DEFAULTS)

    @model_validator(mode="after")
    def _noise_is_given_once(self) -> DifferentialPrivacySettings:
        if self.unit == "none":
            return self
        if (self.epsilon is None) == (self.noise_multiplier is None):
            state = "both missing" if self.epsilon is None else "both given"
            raise ValueError(f"epsilon and noise_multiplier are {state}; give one of them, the other follows from it")
        if self.placement == "distributed" and self.accountant != "RDP":
            raise ValueError("noise in whole numbers is accounted for by RDP; leave accountant out")
        if self.placement == "central" and self.colluders is not None:
            raise ValueError("with central noise no party has a share to take away; leave colluders out")
        if self.placement == "distributed" and self.adaptive_clip:
            raise ValueError("the clip norm can be adapted by a server that is trusted; leave adaptive_clip out")
        return self

    @property
    def limits(self) -> tuple[float, float, AccountantName]:
        """The epsilon (infinite where the noise is given), delta, and who adds up, of a unit that is hidden."""
        if self.delta is None or self.accountant is None:
            raise ValueError("nothing is hidden, so there is no delta")
        return math.inf if self.epsilon is None else self.epsilon, self.delta, self.accountant

    @property
    def is_local(self) -> bool:
        """Whether each party adds noise to its own training."""
        return self.unit in ("example", "group")
