"""What keeps local training near the global state: called after clipping, right before each step of the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

# (learning rate of the step) -> changes gradients or parameters in place.
Correction = Callable[[float], None]
_Parameters = Mapping[str, torch.nn.Parameter]


def _beside(parameters: _Parameters, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # Once a round: tensors of a message are read from where they lie at each look.
    return {name: tensors[name].to(parameter) for name, parameter in parameters.items()}


def together(*corrections: Correction | None) -> Correction | None:
    """Return one correction that makes several in turn, or None where there is none.

    Args:
        corrections: In their order; None for those that are not there.
    """
    found = [correct for correct in corrections if correct is not None]

    def correct_all(rate: float) -> None:
        for correct in found:
            correct(rate)

    return correct_all if found else None


def proximal(parameters: _Parameters, anchor: Mapping[str, torch.Tensor], mu: float) -> Correction:
    """Return FedProx's pull as a part of the gradient: g <- g + mu (theta - anchor).

    Source: Li et al. 2020, arXiv:1812.06127, equation 2. It is the gradient of mu/2 |theta - anchor|^2, which the
    optimiser then scales as it does the rest: under AdamW it is not the textbook's pull, see `decoupled_proximal`.

    Args:
        parameters: What is trained.
        anchor: The global state.
        mu: Strength.
    """

    fixed = _beside(parameters, anchor)

    def correct(rate: float) -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - fixed[name], alpha=mu)

    return correct


def decoupled_proximal(parameters: _Parameters, anchor: Mapping[str, torch.Tensor], mu: float) -> Correction:
    """Return the pull as a step of its own: theta <- theta - rate mu (theta - anchor), as AdamW decays weights.

    Args:
        parameters: What is trained.
        anchor: The global state.
        mu: Strength.
    """

    fixed = _beside(parameters, anchor)

    def correct(rate: float) -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    parameter.sub_(parameter - fixed[name], alpha=rate * mu)

    return correct


def control_variate(
    parameters: _Parameters, own: Mapping[str, torch.Tensor], shared: Mapping[str, torch.Tensor]
) -> Correction:
    """Return SCAFFOLD's correction of the drift: g <- g - c_i + c.

    Source: Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1, line 10.

    Args:
        parameters: What is trained.
        own: The party's control variate c_i.
        shared: The server's, c.
    """

    shift = _beside(parameters, {name: shared[name] - own[name] for name in parameters})

    def correct(rate: float) -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad.add_(shift[name])

    return correct


def next_control(
    own: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
    update: Mapping[str, torch.Tensor],
    *,
    rates: float,
) -> dict[str, torch.Tensor]:
    """Return c_i after a round by option II: c_i - c - update / (sum of the steps' learning rates).

    Source: as `control_variate`, equation 4. With a learning rate that changes from step to step, H eta_l is the sum
    of the rates. It is the mean gradient of the round under plain SGD, and under no other optimiser.

    Args:
        own: c_i before the round.
        shared: c.
        update: The party's tensors after the round - those before it.
        rates: Sum of the learning rates of the round's steps.
    """
    return {name: own[name] - shared[name] - delta / rates for name, delta in update.items()}
