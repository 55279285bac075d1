"""The same job gives the same bits: again, in another order of answering, in worker processes, from any seed state."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from crashes import committed_once, lasting
from tiny import TinyFederation

from fedllm.runs.folder import RunFolder
from fedllm.runs.plan_files import write_plan
from fedllm.runtime.local import InProcessLink, local_hosts
from fedllm.runtime.run import RunResult, carry_out
from fedllm.runtime.site import open_site, party_tokens

Make = Callable[..., TinyFederation]

# Everything that draws: dropout, cohorts, the order of the data, the first adapter.
PLAN: dict[str, Any] = {
    "federation.num_rounds": 3,
    "federation.fraction_train": 0.7,
    "federation.strategy": {"name": "FedAvgM", "server_momentum": 0.6},
    "peft.lora_dropout": 0.2,
    "train.gradient_accumulation_steps": 2,
    "evaluate.test": "data/north-eval.jsonl",
}


@pytest.fixture
def federation(make_federation: Make) -> TinyFederation:
    return make_federation(job=PLAN)


def run_in_order(federation: TinyFederation, name: str, order: tuple[str, ...]) -> RunResult:
    job, parties = federation.job(), federation.parties()
    site = open_site(job, parties)
    data = {located.party.name: party_tokens(site, located) for located in parties}
    run = RunFolder.create(federation.folder / name, job_digest=job.digest)
    try:
        write_plan(run, job, parties)
        return carry_out(run, job, parties, InProcessLink(local_hosts(site, data, run), order=order))
    finally:
        run.close()


def test_the_same_job_gives_the_same_adapter_and_metrics(federation: TinyFederation) -> None:
    one, two = federation.run("one"), federation.run("two")
    assert one.adapter_sha256 == two.adapter_sha256
    assert lasting(one.rows()) == lasting(two.rows())
    sent = [sorted(map(str, (row for row in result.rows() if "bytes" in row["name"]))) for result in (one, two)]
    assert sent[0] == sent[1]


def test_parties_that_answer_in_another_order_give_the_same_adapter_and_metrics(federation: TinyFederation) -> None:
    first = federation.run("first")
    for number, order in enumerate([("south", "east", "north"), ("east", "north", "south")]):
        result = run_in_order(federation, f"order{number}", order)
        assert result.adapter_sha256 == first.adapter_sha256
        assert lasting(result.rows()) == lasting(first.rows())


def test_another_seed_gives_another_adapter(make_federation: Make, federation: TinyFederation) -> None:
    other = make_federation("other", job=PLAN | {"seed": 8})
    assert other.run().adapter_sha256 != federation.run().adapter_sha256


def test_worker_processes_give_the_same_adapter_and_metrics(make_federation: Make) -> None:
    # With secure sums, so that the parties of one process take part in sums with those of another.
    secure = {"federation.fraction_train": 1.0, "privacy.secure_aggregation": {"enabled": True}}
    federation = make_federation(job=PLAN | secure)
    here = federation.run("here")
    there = federation.run("there", num_workers=2)
    assert there.adapter_sha256 == here.adapter_sha256
    assert lasting(there.rows()) == lasting(here.rows())
    committed_once(there.path, 3)


def test_the_global_generators_are_neither_changed_nor_used(federation: TinyFederation) -> None:
    shas = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
        shas.append(federation.run(f"seed{seed}").adapter_sha256)
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
        assert torch.equal(torch.random.get_rng_state(), before[2])
    assert shas[0] == shas[1]


def test_a_federation_starts_within_two_seconds_of_processor_time(federation: TinyFederation) -> None:
    federation.run("imports")
    begun: list[float] = []
    started = time.process_time()
    from fedllm.runtime.run import Watch

    federation.run("timed", watch=Watch(on_round=lambda number, rows: begun.append(time.process_time() - started)))
    assert begun[0] < 2.0, "from the job file to the first committed round"
