"""Server optimisers: the mean update of a round -> the next global state, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedllm.variants import with_own

Tensors = dict[str, torch.Tensor]
Numbers = Mapping[str, float]
# (mean update, memory, numbers) -> (step, memory), of one tensor.
_Step = Callable[[torch.Tensor, Tensors, Numbers], tuple[torch.Tensor, Tensors]]
_MEMORY = ("m", "v")

_PROX: dict[str, Any] = {"proximal_mu": 0.0, "proximal": "gradient"}
_ADAPTIVE: dict[str, Any] = {"server_learning_rate": 0.01, "server_tau": 1e-3, **_PROX}
_MOMENTS: dict[str, Any] = {**_ADAPTIVE, "server_beta1": 0.9, "server_beta2": 0.99}
# Which settings a strategy has, and what they are where the job does not say.
DEFAULTS: dict[str, dict[str, Any]] = {
    "FedAvg": {"server_learning_rate": 1.0, **_PROX},
    "FedProx": {"server_learning_rate": 1.0, **_PROX, "proximal_mu": 0.01},
    "SCAFFOLD": {"server_learning_rate": 1.0},
    "FedAvgM": {"server_learning_rate": 1.0, "server_momentum": 0.9, **_PROX},
    "FedAdagrad": _ADAPTIVE,
    "FedYogi": _MOMENTS,
    "FedAdam": _MOMENTS,
    "DiLoCo": {"server_learning_rate": 0.7, "server_momentum": 0.9, **_PROX},
}


class StrategySettings(BaseModel):
    """How the mean update becomes the next global state, and what keeps the parties near it meanwhile."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: Literal["FedAvg", "FedProx", "SCAFFOLD", "FedAvgM", "FedAdagrad", "FedYogi", "FedAdam", "DiLoCo"] = Field(
        "FedAvg", description="The strategy."
    )
    server_learning_rate: float | None = Field(
        None, gt=0, description="Factor on the server's step: 1; FedAdagrad, FedYogi, FedAdam: 0.01; DiLoCo: 0.7."
    )
    server_momentum: float | None = Field(None, gt=0, lt=1, description="FedAvgM, DiLoCo: momentum, 0.9.")
    server_beta1: float | None = Field(None, ge=0, lt=1, description="FedYogi, FedAdam: decay of the mean, 0.9.")
    server_beta2: float | None = Field(None, ge=0, lt=1, description="FedYogi, FedAdam: decay of the square, 0.99.")
    server_tau: float | None = Field(
        None, gt=0, description="FedAdagrad, FedYogi, FedAdam: what is added to the root of the square, 0.001."
    )
    proximal_mu: float | None = Field(
        None, ge=0, description="Pull of local training towards the global state: 0; FedProx: 0.01. Not with SCAFFOLD."
    )
    proximal: Literal["gradient", "decoupled"] | None = Field(
        None, description="Whether the pull is a part of the gradient (as in FedProx), or a step of its own."
    )

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_strategy(cls, values: Any) -> Any:
        return with_own(values, cls.model_fields, key="name", default="FedAvg", variants=DEFAULTS)

    @model_validator(mode="after")
    def _pull_of_fedprox(self) -> StrategySettings:
        if self.name == "FedProx" and not self.proximal_mu:
            raise ValueError("FedProx needs proximal_mu above 0; set it, or `name: FedAvg`")
        if self.proximal == "decoupled" and not self.proximal_mu:
            raise ValueError("`proximal: decoupled` has no effect without proximal_mu; set it, or leave it out")
        return self

    @property
    def numbers(self) -> dict[str, float]:
        """The strategy's numbers by name."""
        return {key: value for key, value in self.model_dump(exclude={"name", "proximal"}).items() if value is not None}


def server_step(
    state: Mapping[str, torch.Tensor],
    memory: Mapping[str, torch.Tensor],
    mean_update: Mapping[str, torch.Tensor],
    *,
    settings: StrategySettings,
) -> tuple[Tensors, Tensors]:
    """Return the next state and what the strategy remembers of it.

    An update points downhill, so steps are added.

    Args:
        state: Global tensors. Those without an update stay as they are.
        memory: What the last call returned; empty at first.
        mean_update: Weighted mean of (party's tensors - global tensors), by name.
        settings: The strategy.
    """
    stepped, kept, numbers = dict(state), dict(memory), settings.numbers
    for name, update in mean_update.items():
        # The memory of each tensor is its own: not every round moves every tensor.
        mine = {key: kept[f"{key}/{name}"] for key in _MEMORY if f"{key}/{name}" in kept}
        step, mine = STEPS[settings.name](update, mine, numbers)
        eta = numbers["server_learning_rate"]
        # Times 1 is left out: it changes no bit, and would need the tensor's memory once more.
        stepped[name] = state[name] + (step if eta == 1 else step * eta)
        kept |= {f"{key}/{name}": tensor for key, tensor in mine.items()}
    return stepped, kept


def _plain(update: torch.Tensor, memory: Tensors, numbers: Numbers) -> tuple[torch.Tensor, Tensors]:
    """FedAvg, McMahan et al. 2017, arXiv:1602.05629, algorithm 1: theta <- theta + eta Delta."""
    return update, {}


def _momentum(update: torch.Tensor, memory: Tensors, numbers: Numbers) -> tuple[torch.Tensor, Tensors]:
    """FedAvgM, Hsu et al. 2019, arXiv:1909.06335, section 4.3: m <- beta m + Delta; theta <- theta + eta m."""
    moved = memory["m"] * numbers["server_momentum"] + update if "m" in memory else update
    return moved, {"m": moved}


def _nesterov(update: torch.Tensor, memory: Tensors, numbers: Numbers) -> tuple[torch.Tensor, Tensors]:
    """DiLoCo's outer SGD with Nesterov momentum, Douillard et al. 2023, arXiv:2311.08105, algorithm 1.

    m <- mu m + Delta; theta <- theta + eta (Delta + mu m).
    """
    moved, memory = _momentum(update, memory, numbers)
    return update + moved * numbers["server_momentum"], memory


def _adagrad(update: torch.Tensor, memory: Tensors, numbers: Numbers) -> tuple[torch.Tensor, Tensors]:
    """FedAdagrad, Reddi et al. 2021, arXiv:2003.00295, algorithm 2, with beta1 = 0: v <- v + Delta^2."""
    square = _square_before(memory, update, numbers) + update.square()
    return update / (square.sqrt() + numbers["server_tau"]), {"v": square}


def _yogi(update: torch.Tensor, memory: Tensors, numbers: Numbers) -> tuple[torch.Tensor, Tensors]:
    """FedYogi, as FedAdagrad's source: v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)."""
    before, squared = _square_before(memory, update, numbers), update.square()
    square = before - (1 - numbers["server_beta2"]) * squared * torch.sign(before - squared)
    return _adaptive(update, memory, square, numbers)


def _adam(update: torch.Tensor, memory: Tensors, numbers: Numbers) -> tuple[torch.Tensor, Tensors]:
    """FedAdam, as FedAdagrad's source: v <- beta2 v + (1 - beta2) Delta^2; without a bias correction, as there."""
    before = _square_before(memory, update, numbers)
    square = numbers["server_beta2"] * before + (1 - numbers["server_beta2"]) * update.square()
    return _adaptive(update, memory, square, numbers)


def _adaptive(
    update: torch.Tensor, memory: Tensors, square: torch.Tensor, numbers: Numbers
) -> tuple[torch.Tensor, Tensors]:
    mean = (1 - numbers["server_beta1"]) * update
    if "m" in memory:
        mean = numbers["server_beta1"] * memory["m"] + mean
    return mean / (square.sqrt() + numbers["server_tau"]), {"m": mean, "v": square}


def _square_before(memory: Tensors, update: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    # The paper asks for v >= tau^2 before the first round.
    return memory["v"] if "v" in memory else torch.full_like(update, numbers["server_tau"] ** 2)


STEPS: dict[str, _Step] = {
    "FedAvg": _plain,
    "FedProx": _plain,
    "SCAFFOLD": _plain,
    "FedAvgM": _momentum,
    "DiLoCo": _nesterov,
    "FedAdagrad": _adagrad,
    "FedYogi": _yogi,
    "FedAdam": _adam,
}
