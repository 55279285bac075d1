"""Drives a run: handshake, rounds as transactions, recovery from the newest state that all can go on from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedllm.errors import ModelError, PayloadError, RunPaused, StateLost
from fedllm.runs.checkpoint import Generations
from fedllm.runs.folder import RunFolder
from fedllm.runs.jsonl import finite
from fedllm.runtime.base import Done, Hello, Ready, Restore, Timings, Witness
from fedllm.runtime.bytes_after import counted_after
from fedllm.runtime.federation import LinkedFederation, parties_error
from fedllm.runtime.guard import Auditor
from fedllm.runtime.notary import Notary
from fedllm.scenarios.base import RoundResult, Row, ServerHalf, State
from fedllm.wire.payload import Failure, Payload

if TYPE_CHECKING:
    from fedllm.runtime.courier import Courier

# Keys of the saved fields that belong to the driver, not to the scenario.
_TRAINED, _ROWS = "driver/trained", "driver/rows"


OnRound = Callable[[int, list[Row]], None]


@dataclass(frozen=True)
class Outcome:
    """A finished run's last state and what went wrong on the way."""

    state: State
    failures: dict[str, str]


@dataclass
class Driver:
    """One process's work on a run. Make a new one to resume."""

    run: RunFolder
    federation: LinkedFederation
    server: ServerHalf
    num_rounds: int
    on_round: OnRound = lambda number, rows: None
    on_ready: Callable[[Ready], None] = lambda ready: None
    auditor: Auditor | None = None
    notary: Notary | None = None
    courier: Courier | None = None

    def drive(self) -> Outcome:
        """Return the outcome after the last round, starting or resuming as the run folder says.

        Raises:
            RunPaused: The run can be resumed.
            RunFailed: It would fail again.
            StateLost: Every checkpoint is damaged.
        """
        if self.courier:
            self.courier.deliver(self.federation)
        state, failures = self._open(), dict[str, str]()
        if self.notary:
            self.notary.open(self.federation)
        while state is None or state.round < self.num_rounds:
            number = 0 if state is None else state.round + 1
            self.run.journal(number, "begin")
            self.run.event("round_started", round_=number)
            self.federation.timings = Timings()
            result = self.server.start(self.federation) if state is None else self.server.round(self.federation, state)
            for party, code in result.failures.items():
                self.run.event("party_failed", round_=number, party=party, code=code)
            failures |= result.failures
            state = result.state
            self._commit(result)
        if self.auditor:
            self.auditor.finished(state.round)
            self._exchange_heads(state.round)
        return Outcome(state, failures)

    def _commit(self, result: RoundResult) -> None:
        number, started = result.state.round, time.perf_counter()
        rows = finite(result.rows + self._wire_rows(number))
        fields = result.state.fields | {_TRAINED: self.federation.trained, _ROWS: rows}
        digest = self.run.checkpoints().save(replace(result.state, fields=fields))
        write = {"round": number, "party": None, "split": None, "name": "seconds_write"}
        rows = [*rows, write | {"value": time.perf_counter() - started}]
        self.run.rows().append(rows)
        self.run.journal(number, "commit", sha256=digest)
        self.run.event("round_committed", round_=number)
        self.on_round(number, rows)
        if self.auditor:
            self.auditor.committed(number, digest)
            self._exchange_heads(number)
        if self.notary:
            with counted_after(self.run, self.federation, number):
                self.notary.committed(self.federation, number, digest)

    def _exchange_heads(self, number: int) -> None:
        assert self.auditor is not None  # noqa: S101
        # A party that does not answer is missed in the next round; the one that is committed stands.
        for reply in self.federation.ask(self.auditor.heads(), round_=number, to=self.federation.parties):
            if isinstance(reply.payload, Witness):
                self.auditor.note(reply.party, reply.payload, round_=number)

    def _wire_rows(self, number: int) -> list[Row]:
        head: Row = {"round": number, "party": None, "split": None}
        timings = self.federation.timings
        rows = [
            head | {"name": "seconds_wait", "value": timings.wait},
            head | {"name": "seconds_aggregate", "value": timings.aggregate},
        ]
        for (party, way), count in sorted(self.federation.ledger.of_round(number).items()):
            rows.append(head | {"party": party, "name": f"bytes_{way}", "value": count})
        for party, count in sorted(self.federation.ledger.saved_in(number).items()):
            rows.append(head | {"party": party, "name": "bytes_saved_down", "value": count})
        return rows

    def _open(self) -> State | None:
        states = self.run.checkpoints()
        candidates = self._candidates(states)
        trained = {number: _trained(states.load(number)) for number in candidates}
        rounds = [*candidates] or [0]
        hello = Hello(
            rounds=rounds,
            trained={
                party: [trained.get(number, {}).get(party, 0) for number in rounds] for party in self.federation.parties
            },
        )
        ready = self._handshake(hello)
        agreed = ready[self.federation.parties[0]]
        self.on_ready(agreed)
        self.federation.expect(agreed.tensors())
        number = _common_round(ready, rounds)
        self._settle_journal(number if candidates else None)
        # Without a checkpoint not even round 0 is committed, and what the parties noted of it is forgotten.
        self._restore(number if candidates else -1, trained.get(number, {}))
        if not candidates:
            self.run.rows().rewind(-1)
            return None
        return self._rewound(states, number)

    def _candidates(self, states: Generations) -> list[int]:
        valid = states.valid()
        if not valid and (states.present() or self.run.last_commit() is not None):
            raise StateLost(
                "STATE_CORRUPT",
                "no checkpoint of the run can be read; it is not restarted from round 0 by itself",
                where=str(states.folder),
                fix="restore the folder from a backup, or start a new run with `fedllm run`",
            )
        return valid

    def _settle_journal(self, number: int | None) -> None:
        last = self.run.last_commit()
        if number is None or number == last:
            return
        if last is not None and number < last:
            self.run.journal(number, "rollback")
            self.run.event("rolled_back", round_=number, detail=f"round {last} is damaged; going on from {number}")
        else:
            # The crash came between the checkpoint, which is what counts, and its line.
            self.run.journal(number, "commit", sha256=self.run.checkpoints().digest(number))
            self.run.event("round_committed", round_=number)

    def _rewound(self, states: Generations, number: int) -> State:
        states.forget_after(number)
        state = states.load(number)
        rows = self.run.rows()
        # The rows of the newest round may have been cut off by the crash; the checkpoint holds them too.
        rows.rewind(number - 1)
        rows.append(state.fields[_ROWS])
        self.federation.trained |= _trained(state)
        kept = {key: value for key, value in state.fields.items() if not key.startswith("driver/")}
        return replace(state, fields=kept)

    def _handshake(self, hello: Hello) -> dict[str, Ready]:
        ready: dict[str, Ready] = {}
        refused: dict[str, str] = {}
        for reply in self.federation.ask(hello, round_=0, to=self.federation.parties):
            if isinstance(reply.payload, Failure):
                refused[reply.party] = reply.payload.code
            else:
                ready[reply.party] = _expected(reply.party, reply.payload, Ready)
        if refused:
            raise parties_error(refused)
        first = self.federation.parties[0]
        for party in self.federation.parties:
            if party not in ready:
                raise RunPaused("QUORUM", "no answer to the handshake", where=f"party {party}")
            _check_agreement(first, ready[first], party, ready[party])
        return ready

    def _restore(self, number: int, trained: dict[str, int]) -> None:
        last = {party: trained.get(party, 0) for party in self.federation.parties}
        request = Restore(committed_round=number, trained=last)
        for reply in self.federation.ask(request, round_=max(number, 0), to=self.federation.parties):
            _expected(reply.party, reply.payload, Done)


def _trained(state: State) -> dict[str, int]:
    return {party: int(number) for party, number in state.fields[_TRAINED].items()}


def _expected(party: str, payload: Payload, cls: type[Any]) -> Any:
    if isinstance(payload, Failure):
        raise parties_error({party: payload.code})
    if not isinstance(payload, cls):
        raise PayloadError("PAYLOAD_REFUSED", "another answer than the handshake asks for", where=party)
    return payload


def _common_round(ready: dict[str, Ready], rounds: list[int]) -> int:
    for number in rounds:
        if all(number in answer.rounds for answer in ready.values()):
            return number
    lost = sorted(party for party, answer in ready.items() if rounds[0] not in answer.rounds)
    raise StateLost(
        "STATE_CORRUPT",
        f"no committed round is left that all parties can go on from (state lost at: {', '.join(lost)})",
        fix="restore the party's folder from a backup, or start a new run with `fedllm run`",
    )


def _check_agreement(first: str, expected: Ready, party: str, found: Ready) -> None:
    names = ("base_digest", "tokenizer_digest", "template_digest", "common_digest", "manifest", "beside", "versions")
    for name in names:
        if getattr(found, name) != getattr(expected, name):
            raise ModelError(
                "MODEL_MISMATCH",
                f"`{party}` and `{first}` differ in {name.replace('_', ' ')}",
                where=f"party {party}",
                fix="give all parties the same base model, tokenizer, template, test set and library versions",
            )
