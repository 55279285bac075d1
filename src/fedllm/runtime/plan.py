"""What a run will cost and who will see what, before it starts."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from fedllm.job.job import Job, LocatedParty
from fedllm.job.policy import Upload
from fedllm.models.adapter import TunableModel
from fedllm.runs.folder import RunFolder
from fedllm.runtime.driver import Driver
from fedllm.runtime.federation import LinkedFederation
from fedllm.runtime.local import InProcessLink, local_hosts
from fedllm.runtime.site import Site, open_site, party_tokens
from fedllm.runtime.validate import Facts
from fedllm.scenarios.base import TokenData
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.supervised import SupervisedTrainer
from fedllm.wire.ledger import ByteLedger
from fedllm.wire.payload import Tensors

_PROBE_STEPS = 3
_DRY_ROUNDS = 4


@dataclass(frozen=True)
class Plan:
    """The consequences of a job. Times and memory are of this machine."""

    trainable_parameters: int
    num_rounds: int
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]
    total_bytes: int
    seconds_per_step: float
    seconds_total: float
    peak_memory_bytes: int
    party_memory_bytes: int
    who_learns_what: tuple[str, ...]


def make_plan(job: Job, parties: list[LocatedParty], facts: Facts) -> Plan:
    """Return what a run will cost, from a rehearsal of the messages and a few steps of training.

    Args:
        job: The job.
        parties: Its party files.
        facts: From `validate`.
    """
    traffic = rehearse(job, facts)
    site = open_site(job, parties)
    data = {located.party.name: party_tokens(site, located) for located in parties}
    probe = _probe(site, data)
    adapter_bytes = sum(spec.num_bytes for spec in facts.skeleton.manifest.values())
    per_party = adapter_bytes * (2 if job.train.optim == "adamw_torch" else 1)
    others = per_party * (len(parties) - 1) if job.train.optimizer_state == "keep" else 0
    return Plan(
        trainable_parameters=facts.skeleton.num_trainable(),
        num_rounds=job.federation.num_rounds,
        bytes_up=traffic.up,
        bytes_down=traffic.down,
        total_bytes=traffic.total,
        seconds_per_step=probe.seconds_per_step,
        seconds_total=probe.seconds_total,
        peak_memory_bytes=probe.peak_bytes + others,
        party_memory_bytes=per_party,
        who_learns_what=job.table_line().who_learns_what,
    )


class _Rehearsal:
    """A model of the right shapes that computes nothing, for messages of the right length.

    What it reads differs each time: an adapter that did not change would not be sent again.
    """

    def __init__(self, real: TunableModel) -> None:
        self.manifest = real.manifest
        self.trainable = {name: torch.nn.Parameter(spec.zeros()) for name, spec in real.manifest.items()}
        self.model = torch.nn.Linear(1, 1)
        self._reads = 0

    def read(self) -> Tensors:
        self._reads += 1
        return {name: spec.zeros().fill_(self._reads) for name, spec in self.manifest.items()}

    def initial(self, seed: int) -> Tensors:
        return self.read()

    def write(self, tensors: Tensors) -> None:
        pass

    def only(self, names: Iterable[str]) -> AbstractContextManager[None]:
        return nullcontext()


class _NoTraining:
    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        return TrainSums(loss_nats=1234.5678901234567, tokens=12345, examples=100, steps=task.num_steps)


@dataclass(frozen=True)
class Traffic:
    """Bytes as encoded: up and down per party in a usual round, in the whole run, and a party's most."""

    up: dict[str, int]
    down: dict[str, int]
    total: int
    most_up: dict[str, Upload]


def rehearse(job: Job, facts: Facts) -> Traffic:
    """Return what a run sends.

    The conversation is really held, over the real wire, with zeros in place of training; rounds beyond the first
    few are taken to repeat the last ones of these. Nothing of the other parties is needed.

    Args:
        job: The job.
        facts: From `validate`, for any of its parties.
    """
    # Evaluations come every so many rounds, and some rules do in turns what they do.
    every = math.lcm(2, max(1, getattr(job.federation, "eval_every", 1)))
    rounds = min(job.federation.num_rounds, every + -(-_DRY_ROUNDS // every) * every)
    # Round 1 may differ: nobody holds yet what a change could be made to.
    usual = range(min(rounds, every) + 1, rounds + 1) if rounds > every else range(1, rounds + 1)
    federation = job.federation.model_copy(update={"num_rounds": rounds})
    short = job.model_copy(update={"federation": federation}).located(job.base_dir)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", job_digest=job.digest)
        ledger = _talk(short, facts, run)
        run.close()
    of = partial(_bytes_of, ledger, usual)
    each = [sum(ledger.of_round(number).values()) for number in range(rounds + 1)]
    later = sum(each[number] for number in usual) / len(usual) * (job.federation.num_rounds - rounds)
    return Traffic(
        up={party: of(party, "up") for party in job.parties},
        down={party: of(party, "down") for party in job.parties},
        total=sum(each) + round(later),
        most_up=_most_up(job, ledger, rounds),
    )


def _bytes_of(ledger: ByteLedger, rounds: range, party: str, way: str) -> int:
    counts: list[int] = [ledger.of_round(number).get((party, way), 0) for number in rounds]
    return round(sum(counts) / len(rounds))


def _most_up(job: Job, ledger: ByteLedger, rounds: int) -> dict[str, Upload]:
    # Any party may be drawn in every round, and then sends what the largest sender of the rehearsal did.
    later = max(
        num_bytes
        for number in range(1, rounds + 1)
        for (_, way), num_bytes in ledger.of_round(number).items()
        if way == "up"
    )
    starts = {party: ledger.of_round(0).get((party, "up"), 0) for party in job.parties}
    total = later * job.federation.num_rounds
    return {party: Upload(max(start, later), start + total) for party, start in starts.items()}


def _talk(job: Job, facts: Facts, run: RunFolder) -> ByteLedger:
    from fedllm.models.load import Base
    from fedllm.runtime.host import Blobs

    model: Any = _Rehearsal(facts.skeleton)
    tokenizer: Any = type("Tokenizer", (), {"pad_token_id": 0})
    base = Base(None, tokenizer, facts.digests["base"], facts.digests["tokenizer"])
    digest = facts.digests["template"]
    site = Site(job, base, facts.folder, model, Blobs({}), [], digest, digest)
    data = {party: TokenData([_one_example()] * 8, [], []) for party in job.parties}
    link = InProcessLink(local_hosts(site, data, run, trainer=_NoTraining()))
    line = job.table_line()
    federation = LinkedFederation(
        link, kinds=line.kinds(), job_digest=run.job_digest, run_id=run.run_id, timeout_s=job.federation.round_timeout
    )
    server = line.server(job.federation, seed=job.seed, common=job.evaluate.test is not None)
    Driver(run, federation, server, job.federation.num_rounds).drive()
    return federation.ledger


def _one_example() -> Any:
    from fedllm.data.tokens import TokenisedExample

    return TokenisedExample(input_ids=(0, 0), loss_mask=(False, True), truncated=False, target_bytes=1)


@dataclass(frozen=True)
class _Probe:
    seconds_per_step: float
    seconds_total: float
    peak_bytes: int


def _probe(site: Site, data: dict[str, TokenData]) -> _Probe:
    job = site.job
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", job_digest=job.digest)
        tried = {name: tokens for name, tokens in data.items() if name == max(data, key=lambda n: len(data[n].train))}
        steps = job.train.model_copy(update={"local_steps": _PROBE_STEPS, "local_epochs": None})
        federation = job.federation.model_copy(update={"num_rounds": 1, "min_parties": 1})
        short = job.model_copy(update={"train": steps, "federation": federation}).located(job.base_dir)
        trainer = _Timed()
        probe_site = Site(**{**vars(site), "job": short})
        link = InProcessLink(local_hosts(probe_site, tried, run, trainer=trainer))
        line, started = job.table_line(), time.perf_counter()
        server = line.server(federation, seed=job.seed, common=job.evaluate.test is not None)
        talk = LinkedFederation(link, kinds=line.kinds(), job_digest=run.job_digest, run_id=run.run_id, timeout_s=3600)
        Driver(run, talk, server, 1).drive()
        spent = time.perf_counter() - started
        run.close()
    # Two evaluations of the largest party, and the messages, are what the rest of the rehearsal took.
    evaluation = (spent - trainer.seconds) / 2
    return _extrapolate(job, data, trainer.seconds / _PROBE_STEPS, evaluation)


class _Timed(SupervisedTrainer):
    seconds = 0.0

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        started = time.perf_counter()
        try:
            return super().train(task, optimizer)
        finally:
            self.seconds += time.perf_counter() - started


def _extrapolate(job: Job, data: dict[str, TokenData], per_step: float, evaluation: float) -> _Probe:
    share = job.federation.fraction_train
    steps = sum(steps_per_round(job, len(tokens.train)) for tokens in data.values()) * share
    every = getattr(job.federation, "eval_every", 1)
    largest = max(len(tokens.held_out) + len(tokens.common) for tokens in data.values()) or 1
    examples = sum(len(tokens.held_out) for tokens in data.values()) + len(next(iter(data.values())).common)
    per_round = steps * per_step + (evaluation * examples / largest / every if every else 0.0)
    peak = psutil.Process().memory_info().rss
    return _Probe(per_step, job.federation.num_rounds * per_round, peak)


def steps_per_round(job: Job, num_examples: int) -> int:
    """Return the optimiser steps of a party in one round.

    Args:
        job: The job.
        num_examples: The party's training examples.
    """
    if job.train.local_steps:
        return job.train.local_steps
    batches = (job.train.local_epochs or 1) * -(-num_examples // job.train.per_device_train_batch_size)
    return -(-batches // job.train.gradient_accumulation_steps)
