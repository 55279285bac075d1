"""What a server can read off the updates of a run, for an audit: each is attacked as it comes, and counts are kept.

What is attacked is what leaves a party's half, so noise, clipping and codecs are in it. Under secure sums the server
opens the sum alone, and then that alone is attacked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedllm.aggregate.slots import OWNED, widened
from fedllm.data.tokens import TokenisedExample
from fedllm.errors import ModelError
from fedllm.privacy.gradient_matching import rebuild_text, update_mismatch
from fedllm.privacy.inversion import first_inputs, is_read, span_test
from fedllm.runs.folder import UPDATES
from fedllm.runs.jsonl import write_json
from fedllm.runtime.host import PartyHost
from fedllm.runtime.site import Site
from fedllm.scenarios.base import ClientHalf, Log, State, Summand, TokenData
from fedllm.scenarios.fedhomollm_answer import Answer
from fedllm.scenarios.fedhomollm_messages import select
from fedllm.seeds import torch_generator
from fedllm.tasks import CLASSIFICATION, SEQ2SEQ_LM
from fedllm.train.base import LocalTrainer, TrainSums, TrainTask
from fedllm.train.supervised import step_batches
from fedllm.wire.payload import Payload, Tensors

_SUM = "the sum"
# Words that a search tries texts of.
_MOST_WORDS = 512


@dataclass(frozen=True)
class Heard:
    """One party's update of one round, or the sum of several, and what the attacker is judged by.

    `aim` is the example that a search looks for: the shortest that was read.
    """

    start: Tensors
    update: Tensors
    words: set[int]
    aim: TokenisedExample | None


@dataclass
class Listener:
    """Listens to the first and the last round of a run on this machine, and notes how each update fares under attack.

    Args:
        site: What the process shares.
        run: The run folder, where the rows go.
        data: Each party's tokens, as they are trained on.
        texts: How many texts a search tries for one update; 0: none, and no search.
    """

    site: Site
    run: Path
    data: Mapping[str, TokenData]
    texts: int
    _begun: dict[str, tuple[Tensors, list[TokenisedExample]]] = field(default_factory=dict)
    _round: dict[str, tuple[int, Heard]] = field(default_factory=dict)
    _number: int = 0

    def __post_init__(self) -> None:
        self._rows = update_rows(self.run)
        job = self.site.job
        # What an encoder read and what its decoder wrote cannot be tried apart.
        self._rounds = set() if job.task.name == SEQ2SEQ_LM else {1, job.federation.num_rounds}
        self._cohort = job.federation.cohort_size(len(job.trainers))
        examples = [example for party in job.trainers for example in self.data[party].train]
        # Which words are common is of no help among words that all are somebody's.
        self._pool = sorted(words_read(examples))

    def listen(self, hosts: Mapping[str, PartyHost]) -> None:
        """Stand between parties and what they send.

        Args:
            hosts: Of the parties on this machine; `trainer` must be theirs.
        """
        for party, host in hosts.items():
            host.open_client = partial(_overheard, host.open_client, self, party)

    def trainer(self, trainer: LocalTrainer) -> LocalTrainer:
        """Return a trainer that does what this one does, and has what it reads noted.

        Args:
            trainer: The job's.
        """
        return _Noting(trainer, self)

    def begins(self, task: TrainTask) -> None:
        """Note what a round's training starts from, and reads.

        Args:
            task: The round's work.
        """
        if task.round in self._rounds:
            self._begun[task.party] = (task.model.read(), rows_of(task))

    def answers(self, party: str, number: int, answer: Summand) -> None:
        """Attack an answer to a round of training, as it leaves the party.

        Args:
            party: The party.
            number: The round.
            answer: What it sends.
        """
        job = self.site.job
        if party not in self._begun:
            return
        start, examples = self._begun.pop(party)
        settings: Any = job.federation
        coded = Answer(settings, self.site.model.manifest, number, party)
        decoded = coded.decoded(answer.tensors, seed=job.seed)
        sent = select("update", {name: decoded[name].clone() for name in decoded if name != OWNED})
        aim = min(examples, key=lambda example: len(example.input_ids), default=None)
        heard = Heard(start, widened(sent, start), words_read(examples), aim)
        if number != self._number:
            # Of an earlier round some party did not answer.
            self._round, self._number = {}, number
        self._round[party] = (answer.weight, heard)
        if not job.privacy.secure_aggregation.enabled:
            self._note(number, party, heard)
        if len(self._round) == self._cohort:
            if self._cohort > 1:
                self._note(number, _SUM, _sum_of(self._round.values()))
            self._round = {}

    def _note(self, number: int, whose: str, heard: Heard) -> None:
        found = self._span(heard) or self._search(heard, whose, number)
        head = {"round": number, "whose": whose}
        self._rows = [row for row in self._rows if row.items() & head.items() != head.items()]
        self._rows.append(head | found)
        write_json(self.run / UPDATES, self._rows)

    def _span(self, heard: Heard) -> dict[str, Any] | None:
        """Return what the span test reads; None where it does not apply."""
        try:
            inputs = first_inputs(self.site.model.model, self._pool)
        except ModelError:
            return None
        if not is_read(heard.update):
            return None
        there = [word in heard.words for word in self._pool]
        told = span_test(inputs, heard.update, heard.start, there=there)
        if told is None:
            return _row("span", heard.words, self._pool, None)
        # Some words lie nearer to whatever span than others.
        draws = torch_generator(self.site.job.seed, "span of noise")
        noise = {name: torch.randn(part.shape, generator=draws) for name, part in heard.update.items()}
        of_noise = span_test(inputs, noise, heard.start, there=there)
        ranked = {"auc": told.ranked.auc, "auc_error": told.ranked.auc_error}
        beside = {"auc_of_noise": of_noise.ranked.auc if of_noise else None}
        return _row("span", heard.words, self._pool, told.found) | ranked | beside

    def _search(self, heard: Heard, whose: str, number: int) -> dict[str, Any]:
        """Return what is right of the text whose own update fits best; how long it and its prompt are is known."""
        job, model = self.site.job, self.site.model
        if heard.aim is None or not self.texts or not any(bool(part.any()) for part in heard.update.values()):
            return _row("search", heard.words, self._pool, None)
        # Each party's half writes its own values before it uses the model again.
        model.write(heard.start)
        generator = torch_generator(job.seed, "search", whose, number)
        pool = torch.tensor(self._pool)
        tried = pool[torch.randperm(len(pool), generator=generator)[:_MOST_WORDS]]
        aim = torch.tensor(heard.aim.input_ids)
        mismatch = update_mismatch(
            model.model,
            {name: heard.start[name] for name in heard.update},
            heard.update,
            optimizer="sgd" if job.train.optim == "sgd" else "adamw",
            given=heard.aim.loss_mask.index(True) if any(heard.aim.loss_mask) else 1,
            labels=len(job.task.labels) if job.task.name == CLASSIFICATION else 0,
        )
        text = rebuild_text(mismatch, tried, last=tried, length=len(aim), generator=generator, most=self.texts).text
        named = set(text)
        right = sum(a == b for a, b in zip(text, aim.tolist(), strict=True)) / len(aim)
        found = _row("search", heard.words, self._pool, len(named & heard.words) / len(named))
        return found | {"right_places": right}


def update_rows(run: Path) -> list[dict[str, Any]]:
    """Return how the updates of an audit's run fared under attack, as they are noted in its folder.

    Args:
        run: The run folder.
    """
    file = run / UPDATES
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else []


def rows_of(task: TrainTask) -> list[TokenisedExample]:
    """Return the examples that a round of training reads.

    Args:
        task: The round's work.
    """
    steps = range(task.first_step, task.first_step + task.num_steps)
    if task.private is None:
        return [row for step in steps for rows in step_batches(task, step) for row in rows]
    units = task.private.units
    return [task.examples[index] for step in steps for unit in task.private.sample(step) for index in units[unit]]


def words_read(examples: Sequence[TokenisedExample]) -> set[int]:
    """Return the words that a model reads of examples; the last one of a text is only predicted.

    Args:
        examples: Any number.
    """
    return {word for row in examples for word in row.input_ids[: None if row.label is not None else -1]}


def _row(attack: str, words: Collection[int], pool: Sequence[int], found: float | None) -> dict[str, Any]:
    """Return a row; `found` is the share of the words that the attack names which were there."""
    head = {"attack": attack, "words": len(words), "among": len(pool)}
    rates = {"by_chance": len(words) / len(pool), "found": found}
    return head | rates | {"auc": None, "auc_error": None, "auc_of_noise": None}


def _sum_of(heard: Collection[tuple[int, Heard]]) -> Heard:
    """Return the weighted mean of updates, and the words of them all."""
    weight = sum(each for each, _ in heard)
    parts = [found for _, found in heard]
    mean = {
        name: torch.stack([each / weight * found.update[name].double() for each, found in heard]).sum(0).float()
        for name in parts[0].update
    }
    aims = [found.aim for found in parts if found.aim is not None]
    words = set().union(*(found.words for found in parts))
    return Heard(parts[0].start, mean, words, min(aims, key=lambda aim: len(aim.input_ids), default=None))


@dataclass(frozen=True)
class _Noting:
    trainer: LocalTrainer
    listener: Listener

    @property
    def is_private(self) -> bool:
        return bool(getattr(self.trainer, "is_private", False))

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        self.listener.begins(task)
        return self.trainer.train(task, optimizer)


def _overheard(opens: Callable[[Log], ClientHalf], listener: Listener, party: str, log: Log) -> ClientHalf:
    return _Overheard(opens(log), listener, party)


@dataclass(frozen=True)
class _Overheard:
    half: ClientHalf
    listener: Listener
    party: str

    def handle(self, request: Payload, *, round_: int, deadline: float) -> Payload:
        answer = self.half.handle(request, round_=round_, deadline=deadline)
        if request.commits and isinstance(answer, Summand):
            self.listener.answers(self.party, round_, answer)
        return answer

    def state(self) -> State:
        return self.half.state()

    def restore(self, state: State) -> None:
        self.half.restore(state)
