"""FedAvg with one step of SGD on all of a party's data is SGD on all data together (McMahan et al. 2017, section 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TinyFederation

from fedllm.models.adapter import TunableModel
from fedllm.models.load import load_base
from fedllm.runs.checkpoint import Generations
from fedllm.runs.folder import RunFolder
from fedllm.runtime.run import RunResult
from fedllm.runtime.site import open_site, party_tokens

Make = Callable[..., TinyFederation]
Adapter = dict[str, torch.Tensor]

SIZES = {"north": 3, "east": 11, "south": 6}
RATE, ROUNDS = 0.5, 3
PLAN: dict[str, Any] = {
    "federation.num_rounds": ROUNDS,
    "federation.keep": "last",
    "train.local_steps": 1,
    "train.optim": "sgd",
    "train.learning_rate": RATE,
    "train.lr_scheduler_type": "constant",
    "train.max_grad_norm": 0,
    "train.per_device_train_batch_size": 16,
}


def pooled_sgd(federation: TinyFederation, *, normalization: str) -> list[Adapter]:
    """Return the adapters of rounds 0 to 3 of plain SGD on all data, one example at a time in float32."""
    job = federation.job()
    site = open_site(job, federation.parties())
    examples = [example for located in federation.parties() for example in party_tokens(site, located).train]
    model = TunableModel(load_base(job.model, folder=site.folder).model, job.peft)
    model.write(model.initial(job.seed))
    trajectory = [model.read()]
    for _ in range(ROUNDS):
        losses = []
        for example in examples:
            ids = torch.tensor([example.input_ids])
            log_probs = model.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            picked = log_probs.gather(1, ids[0, 1:, None])[:, 0]
            losses.append(-picked[torch.tensor(example.loss_mask[1:])])
        means = torch.stack([nll.mean() for nll in losses])
        loss = means.mean() if normalization == "examples" else torch.cat(losses).mean()
        gradients = torch.autograd.grad(loss, list(model.trainable.values()))
        values = zip(model.trainable.items(), gradients, strict=True)
        model.write({name: parameter.detach() - RATE * gradient for (name, parameter), gradient in values})
        trajectory.append(model.read())
    return trajectory


def federated(result: RunResult) -> list[Adapter]:
    """Return the global adapters of the last two rounds, from the server's checkpoints."""
    run = RunFolder.open(result.path)
    try:
        states: Generations = run.checkpoints()
        loaded = [states.load(number).tensors for number in (ROUNDS - 1, ROUNDS)]
    finally:
        run.close()
    head = "adapter/"
    return [{n.removeprefix(head): t for n, t in tensors.items() if n.startswith(head)} for tensors in loaded]


def distance(one: Adapter, other: Adapter) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


MATCHING = [("examples", "examples"), ("tokens", "tokens")]
OTHERS = [("examples", "equal"), ("tokens", "equal"), ("examples", "tokens"), ("tokens", "examples")]


@pytest.mark.parametrize(("normalization", "weight_by"), MATCHING)
def test_one_full_batch_step_a_round_is_pooled_sgd(normalization: str, weight_by: str, make_federation: Make) -> None:
    changes = {"train.loss_normalization": normalization, "federation.weight_by": weight_by}
    federation = make_federation(sizes=SIZES, job=PLAN | changes)
    expected = pooled_sgd(federation, normalization=normalization)
    found = federated(federation.run())
    assert distance(found[0], expected[ROUNDS - 1]) < 1e-6
    assert distance(found[1], expected[ROUNDS]) < 1e-6
    # Each round moves the adapter by far more than the tolerance.
    assert all(distance(expected[i], expected[i + 1]) > 1e-3 for i in range(ROUNDS))


@pytest.mark.parametrize(("normalization", "weight_by"), OTHERS)
def test_other_weights_than_the_loss_asks_for_are_not_pooled_sgd(
    normalization: str, weight_by: str, make_federation: Make
) -> None:
    changes = {"train.loss_normalization": normalization, "federation.weight_by": weight_by}
    federation = make_federation(sizes=SIZES, job=PLAN | changes)
    expected = pooled_sgd(federation, normalization=normalization)
    assert distance(federated(federation.run())[1], expected[ROUNDS]) > 1e-4


def test_server_momentum_is_momentum_of_pooled_sgd(make_federation: Make) -> None:
    changes = {
        "train.loss_normalization": "examples",
        "federation.strategy": {"name": "FedAvgM", "server_momentum": 0.6},
    }
    federation = make_federation(sizes=SIZES, job=PLAN | changes)
    plain = pooled_sgd(federation, normalization="examples")
    found = federated(federation.run())
    # The first step has no momentum yet; the second goes 0.6 times the first one further.
    start, first = plain[0], plain[1]
    second = {name: plain[2][name] + 0.6 * (first[name] - start[name]) for name in first}
    assert distance(found[0], second) < 1e-6
    assert distance(found[0], plain[2]) > 1e-4


def test_the_delivered_file_is_the_last_adapter(make_federation: Make) -> None:
    result = make_federation(sizes=SIZES, job=PLAN).run()
    delivered = load_file(result.adapter / "adapter_model.safetensors")
    last = {name.replace(".default", ""): tensor for name, tensor in federated(result)[1].items()}
    assert distance(delivered, last) == 0.0
