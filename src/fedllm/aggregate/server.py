"""Server optimisers: the mean update of a round -> the next global state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

Tensors = dict[str, torch.Tensor]


class StrategySettings(BaseModel):
    """How the server turns the mean update into the next global adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: Literal["FedAvg", "FedAvgM"] = Field("FedAvg", description="FedAvg, or FedAvg with server momentum.")
    server_learning_rate: float = Field(1.0, gt=0, description="Factor on the mean update.")
    server_momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of FedAvgM, for example 0.6; 0 for FedAvg.")

    @model_validator(mode="after")
    def _momentum_belongs_to_fedavgm(self) -> StrategySettings:
        if self.name == "FedAvg" and self.server_momentum:
            raise ValueError("server_momentum has no effect with FedAvg; set `name: FedAvgM`")
        if self.name == "FedAvgM" and not self.server_momentum:
            raise ValueError("FedAvgM needs server_momentum above 0; set it, or `name: FedAvg`")
        return self


def fedavgm(
    state: Mapping[str, torch.Tensor],
    momentum: Mapping[str, torch.Tensor],
    mean_update: Mapping[str, torch.Tensor],
    *,
    settings: StrategySettings,
) -> tuple[Tensors, Tensors]:
    """Return the next state and momentum: m <- beta m + Delta, theta <- theta + eta m.

    Source: Hsu et al. 2019, arXiv:1909.06335, section 4.3 (FedAvgM). Differs: the update points downhill
    already, so it is added. With beta = 0 and eta = 1 this is FedAvg (McMahan et al. 2017, algorithm 1).

    Args:
        state: Global tensors.
        momentum: Momentum by name; a missing name counts as zero.
        mean_update: Weighted mean of (party's tensors - global tensors), by name.
        settings: eta and beta.
    """
    beta, eta = settings.server_momentum, settings.server_learning_rate
    moved = {
        name: momentum[name] * beta + update if beta and name in momentum else update
        for name, update in mean_update.items()
    }
    # Times 1 is left out: it changes no bit, and would need each tensor's memory once more.
    stepped = {name: tensor + (moved[name] if eta == 1 else eta * moved[name]) for name, tensor in state.items()}
    return stepped, moved if beta else {}
