"""What a run will cost and who will see what, before it starts."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch

from fedllm.job.job import Job, LocatedParty
from fedllm.job.policy import Upload
from fedllm.models.adapter import TunableModel
from fedllm.models.package_files import PIECE_BYTES, may_travel
from fedllm.privacy.differential import DifferentialPrivacySettings
from fedllm.privacy.sealed import OVERHEAD_BYTES
from fedllm.privacy.settings import PrivacySettings
from fedllm.runs.folder import RunFolder
from fedllm.runtime.claims_told import claims_foreseen
from fedllm.runtime.driver import Driver
from fedllm.runtime.federation import LinkedFederation
from fedllm.runtime.local import InProcessLink, local_hosts
from fedllm.runtime.noise import NoiseAt, noise_at, steps_per_round, with_earlier
from fedllm.runtime.notary import notary_of
from fedllm.runtime.opening import trainer_for
from fedllm.runtime.rehearsal import rehearse_claims, rehearse_copies
from fedllm.runtime.site import Site, open_site, party_tokens
from fedllm.runtime.sum_keys import terms_of
from fedllm.runtime.validate import Facts, PartyFacts
from fedllm.scenarios.base import TokenData
from fedllm.train.base import LocalTrainer, TrainSums, TrainTask
from fedllm.wire.ledger import ByteLedger
from fedllm.wire.payload import Manifest, Tensors

_PROBE_STEPS = 3
_DRY_ROUNDS = 4
# (party, way) -> bytes.
_Bytes = dict[tuple[str, str], int]


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
    noise: tuple[NoiseAt, ...]
    package_bytes: int
    ownership: tuple[str, ...]


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
    probe = _probe(site, {name: data[name] for name in job.trainers})
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
        who_learns_what=job.table_line().who_learns_what(job.federation, job.privacy),
        noise=tuple(
            with_earlier(found, job, site.purses[found.party], data[found.party])
            for party in facts.parties
            if party.party in job.trainers
            if (found := foreseen_noise(job, party, facts.skeleton.num_trainable()))
        ),
        package_bytes=_package_bytes(job, facts),
        ownership=claims_foreseen(job, parties, facts.skeleton),
    )


def _package_bytes(job: Job, facts: Facts) -> int:
    """Return how long the package is that goes once to each party that lacks it; 0 where none is sent."""
    if job.sender is None:
        return 0
    sizes = [path.stat().st_size for path in facts.folder.iterdir() if path.is_file() and may_travel(path.name)]
    return sum(sizes) + OVERHEAD_BYTES * -(-sum(sizes) // PIECE_BYTES)


class _Rehearsal:
    """A model of the right shapes that computes nothing, for messages of the right length.

    What it reads is random and differs each time: an adapter that did not change would not be sent again, and what has
    a low rank is sent in fewer columns.
    """

    def __init__(self, real: TunableModel) -> None:
        self.manifest, self._real = real.manifest, real
        self.trainable = {name: torch.nn.Parameter(spec.zeros()) for name, spec in real.manifest.items()}
        self.model = torch.nn.Linear(1, 1)
        self._reads = 0

    def read(self) -> Tensors:
        self._reads += 1
        draw = torch.Generator().manual_seed(self._reads)
        return {name: spec.zeros().normal_(generator=draw) for name, spec in self.manifest.items()}

    def initial(self, seed: int) -> Tensors:
        return self.read()

    def write(self, tensors: Tensors) -> None:
        pass

    def beside(self, rank: int) -> Manifest:
        return self._real.beside(rank)

    def only(self, names: Iterable[str]) -> AbstractContextManager[None]:
        return nullcontext()

    def shrunk(self, number: int, num_rounds: int) -> AbstractContextManager[None]:
        return nullcontext()


class _NoTraining:
    makes_no_steps = True

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

    The conversation is really held, over the real wire, with random numbers in place of training; rounds beyond the
    first few are taken to repeat the last ones of these, or to go on growing as they did. Nothing of the other parties
    is needed.

    Args:
        job: The job.
        facts: From `validate`, for any of its parties.
    """
    # Evaluations come every so many rounds, and some rules do in turns what they do.
    beats = (getattr(job.federation, name, 1) for name in ("eval_every", "plug_every", "realign_every"))
    every = math.lcm(2, *(max(1, beat) for beat in beats))
    rounds = min(job.federation.num_rounds, every + -(-_DRY_ROUNDS // every) * every)
    # Round 1 may differ: nobody holds yet what a change could be made to.
    usual = range(min(rounds, every) + 1, rounds + 1) if rounds > every else range(1, rounds + 1)
    # An emulator is not re-aligned after the last round: that one is rehearsed by itself.
    more = 1 if getattr(job.federation, "realign_every", 0) and rounds < job.federation.num_rounds else 0
    federation = job.federation.model_copy(update={"num_rounds": rounds + more})
    # Nothing is trained, so there is nothing to hide, and nothing to pay for.
    privacy = job.privacy.model_copy(update={"differential_privacy": DifferentialPrivacySettings()})
    short = job.model_copy(update={"federation": federation, "privacy": privacy}).located(job.base_dir)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(RunFolder.create(Path(folder) / "run", job_digest=job.digest)) as run,
    ):
        ledger, copies = _talk(short, facts, run)
    counts = [ledger.of_round(number) for number in range(1, rounds + 1)]
    later = _Later(counts, every, cache(partial(_growth, job, facts)), len(job.parties))
    # What does not grow is as in the rehearsal.
    foretold = range(1, job.federation.num_rounds + 1) if _grown(job, facts, 1) else usual
    up, down = (
        {party: round(fmean(later.of(number, party, way) for number in foretold)) for party in job.parties}
        for way in ("up", "down")
    )
    ways = set().union(*counts)
    unlike = range(rounds + 1, job.federation.num_rounds + 1 - more)
    after = sum(later.of(number, *way) for number in unlike for way in ways)
    at_the_ends = [ledger.of_round(number) for number in (0, *([rounds + 1] if more else []))]
    total = sum(sum(found.values()) for found in (*at_the_ends, *counts)) + round(after)
    # A copy has all that stands beside the adapter by then.
    grown = _grown(job, facts, job.federation.num_rounds) - _grown(job, facts, rounds) if copies else 0
    total += sum(copies.values()) + grown * len(job.parties)
    return Traffic(up=up, down=down, total=total, most_up=_most_up(job, facts, ledger, counts, copies))


def _grown(job: Job, facts: Facts, number: int) -> int:
    return job.table_line().grown(job.federation, facts.skeleton.manifest, number, job.parties)


def _growth(job: Job, facts: Facts, number: int) -> int:
    """Return by how much the requests of a round are longer than those of the first one, all parties together.

    Who has just evaluated a global state holds it, and is not sent it again to train on.
    """
    every, last = getattr(job.federation, "eval_every", 1), job.federation.num_rounds
    was_judged, is_judged = (every and (n % every == 0 or n == last) for n in (number - 1, number))
    trains = 0 if was_judged else job.federation.cohort_size(len(job.parties)) * _grown(job, facts, number - 1)
    return trains + (len(job.parties) * _grown(job, facts, number) if is_judged else 0)


@dataclass(frozen=True)
class _Later:
    """Bytes of any round: those of the rehearsal, and after it those of the last such round and what grew since."""

    counts: list[_Bytes]
    every: int
    growth: Callable[[int], int]
    num_parties: int

    def of(self, number: int, party: str, way: str) -> float:
        """Return the bytes of one party and way in a round.

        Args:
            number: The round.
            party: The party.
            way: `up` or `down`.
        """
        like, rounds = number, len(self.counts)
        if number > rounds:
            like = rounds - self.every + 1 + (number - rounds - 1) % self.every
        known = self.counts[like - 1].get((party, way), 0)
        return known + (self.growth(number) - self.growth(like)) / self.num_parties if way == "down" else known


def _most_up(job: Job, facts: Facts, ledger: ByteLedger, counts: list[_Bytes], copies: _Bytes) -> dict[str, Upload]:
    """Return the most that each party may send.

    Any party may be drawn in every round, and then sends what the largest sender of the rehearsal did, but for what
    the two send that differs by the settings. Who does not train is like nobody else.
    """

    @cache
    def size(party: str, number: int) -> int:
        manifest = job.table_line().answer(job.federation, facts.skeleton.manifest, number, party)
        return sum(spec.num_bytes for spec in manifest.values())

    def later(party: str) -> int:
        return max(
            num_bytes - size(sender, number) + size(party, number)
            for number, found in enumerate(counts, start=1)
            for (sender, way), num_bytes in found.items()
            if way == "up" and (sender == party or {sender, party} <= set(job.trainers))
        )

    starts = {party: ledger.of_round(0).get((party, "up"), 0) for party in job.parties}
    most = {party: later(party) for party in job.parties}
    # The last round ends with the receipt of a copy.
    ends = {party: copies.get((party, "up"), 0) for party in job.parties}
    return {
        party: Upload(
            max(start, most[party] + ends[party]), start + most[party] * job.federation.num_rounds + ends[party]
        )
        for party, start in starts.items()
    }


def _talk(job: Job, facts: Facts, run: RunFolder) -> tuple[ByteLedger, _Bytes]:
    from fedllm.models.load import Base
    from fedllm.runtime.host import Blobs

    model: Any = _Rehearsal(facts.skeleton)
    tokenizer: Any = type("Tokenizer", (), {"pad_token_id": 0})
    base = Base(None, tokenizer, facts.digests["base"], facts.digests["tokenizer"])
    digest = facts.digests["template"]
    site = Site(job, base, facts.folder, model, Blobs({}), [], digest, digest, deliver=lambda *adapter: None)
    data = {party: TokenData([_one_example()] * 8 * (party in job.trainers), [], []) for party in job.parties}
    hosts = local_hosts(site, data, run, trainer=_NoTraining())
    rehearse_claims(hosts, job, run)
    link = InProcessLink(hosts)
    line = job.table_line()
    federation = LinkedFederation(
        link, kinds=line.kinds(), job_digest=run.job_digest, run_id=run.run_id, timeout_s=job.federation.round_timeout
    )
    federation.sums = terms_of(job)
    server = line.server(job.federation, seed=job.seed, common=job.evaluate.test is not None)
    outcome = Driver(run, federation, server, job.federation.num_rounds, notary=notary_of(job, run)).drive()
    return federation.ledger, rehearse_copies(run, job, federation, server.final(outcome.state)[0])


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
        changes = {"train": steps, "federation": federation, "privacy": _of_any_noise(job)}
        short = job.model_copy(update=changes).located(job.base_dir)
        trainer = _Timed(trainer_for(job))
        probe_site = Site(**{**vars(site), "job": short, "purses": {}, "claims": {}})
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


def _of_any_noise(job: Job) -> PrivacySettings:
    """Return the privacy of a job of one party whose noise need not be computed: how much there is takes no time."""
    asked = job.privacy.differential_privacy
    if asked.epsilon is not None:
        asked = asked.model_copy(update={"epsilon": None, "noise_multiplier": 1.0})
    return PrivacySettings(differential_privacy=asked)


class _Timed:
    is_private = True

    def __init__(self, trainer: LocalTrainer) -> None:
        self._trainer, self.seconds = trainer, 0.0

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        started = time.perf_counter()
        try:
            return self._trainer.train(task, optimizer)
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


def foreseen_noise(job: Job, facts: PartyFacts, size: int) -> NoiseAt | None:
    """Return what a job means for a party's privacy; None where it hides nothing.

    Args:
        job: The job.
        facts: The party's, from `validate`.
        size: Values in an update.

    Raises:
        ConfigError: `BAD_VALUE`, no noise is enough.
    """
    return noise_at(job, facts.party, examples=facts.train.kept, groups=facts.train.groups, size=size)
