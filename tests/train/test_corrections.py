"""FedProx and SCAFFOLD on quadratics, whose ends are known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedllm.train.corrections import Correction, control_variate, decoupled_proximal, next_control, proximal

Tensors = dict[str, torch.Tensor]


def descend(
    curvature: float,
    optimum: float,
    start: float,
    *,
    steps: int,
    rate: float,
    corrections: Callable[..., list[Correction]],
) -> float:
    """Return where SGD on a/2 (x - x*)^2 ends."""
    parameter = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=rate)
    hooks = corrections({"w": parameter})
    for _ in range(steps):
        optimizer.zero_grad()
        (curvature / 2 * (parameter - optimum).square()).sum().backward()
        for correct in hooks:
            correct(rate)
        optimizer.step()
    return parameter.item()


@pytest.mark.parametrize("pull", [proximal, decoupled_proximal])
def test_the_proximal_end_is_between_the_party_s_optimum_and_the_global_state(pull: Callable[..., Correction]) -> None:
    curvature, optimum, anchor, mu = 2.0, 3.0, -1.0, 0.5
    end = descend(
        curvature, optimum, anchor, steps=2000, rate=0.05,
        corrections=lambda parameters: [pull(parameters, {"w": torch.tensor([anchor])}, mu)],
    )  # fmt: skip
    expected = (curvature * optimum + mu * anchor) / (curvature + mu)
    assert end == pytest.approx(expected, abs=1e-6)
    # Without the pull it ends at its own optimum.
    free = descend(curvature, optimum, anchor, steps=2000, rate=0.05, corrections=lambda parameters: [])
    assert free == pytest.approx(optimum, abs=1e-6)


def test_under_adamw_only_the_decoupled_pull_is_the_textbook_s() -> None:
    """One step from a point off the anchor: AdamW turns every gradient into a step of the learning rate."""
    ends = {}
    for name, pull in {"none": None, "gradient": proximal, "decoupled": decoupled_proximal}.items():
        parameter = torch.nn.Parameter(torch.tensor([2.0]))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0)
        (parameter * 1.0).sum().backward()
        if pull:
            pull({"w": parameter}, {"w": torch.tensor([0.0])}, 0.5)(0.1)
        optimizer.step()
        ends[name] = parameter.item()
    assert ends["gradient"] == pytest.approx(ends["none"], abs=1e-6)
    assert ends["decoupled"] == pytest.approx(ends["none"] - 0.1 * 0.5 * 2.0, abs=1e-6)


def scaffold(rounds: int, *, corrected: bool) -> float:
    """Return where two parties with curvatures 1 and 10 and optima 1 and -1 end: 10 steps of 0.02 a round."""
    parties, steps, rate = [(1.0, 1.0), (10.0, -1.0)], 10, 0.02
    state = 0.0
    shared = {"w": torch.zeros(1, dtype=torch.float64)}
    own = [{"w": torch.zeros(1, dtype=torch.float64)} for _ in parties]
    for _ in range(rounds):
        updates, changes = [], []
        for index, (curvature, optimum) in enumerate(parties):
            end = descend(
                curvature, optimum, state, steps=steps, rate=rate,
                corrections=lambda parameters: [control_variate(parameters, own[index], shared)] if corrected else [],  # noqa: B023
            )  # fmt: skip
            update = {"w": torch.tensor([end - state], dtype=torch.float64)}
            new = next_control(own[index], shared, update, rates=steps * rate)
            changes.append(new["w"] - own[index]["w"])
            own[index] = new
            updates.append(end - state)
        state += sum(updates) / len(parties)
        shared = {"w": shared["w"] + sum(changes) / len(parties)}
    return state


def test_scaffold_ends_at_the_true_optimum_and_fedavg_does_not() -> None:
    assert scaffold(400, corrected=False) == pytest.approx(-0.65985, abs=1e-5)
    assert scaffold(400, corrected=True) == pytest.approx(-9 / 11, abs=1e-6)


def test_what_is_not_trained_is_left_alone() -> None:
    frozen = torch.nn.Parameter(torch.tensor([2.0]))
    for pull in (proximal, decoupled_proximal):
        pull({"w": frozen}, {"w": torch.tensor([0.0])}, 0.5)(0.1)
    control_variate({"w": frozen}, {"w": torch.ones(1)}, {"w": torch.zeros(1)})(0.1)
    assert (frozen.item(), frozen.grad) == (2.0, None)
