"""A party's budget in one run: each round is paid for before its noise is drawn, or it does not take place."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedllm.disk import write_atomic
from fedllm.errors import BudgetExhausted, StateLost
from fedllm.privacy.accountant import Mechanism, epsilon_of
from fedllm.privacy.ledger import Charge, Ledger, spent_on
from fedllm.privacy.noise import NoiseStream, key_name, noise_key
from fedllm.privacy.terms import Terms

# Beside the party files, the run folders or a site's audit log: one ledger per party, for all runs.
PURSE_FOLDER = "privacy"
# Sums of epsilons are compared up to the rounding of the accountant's own tables.
_SLACK = 1e-9


@dataclass(frozen=True)
class Purse:
    """Where a site keeps what has been spent, and the most that it lets all runs spend; None is no limit.

    `noted` is the last line of the ledger by a log that is kept elsewhere, and `note(round, line)` writes one there.
    """

    folder: Path
    max_epsilon: float | None = None
    noted: str = ""
    note: Callable[[int, str], object] = lambda number, line: None

    def ledger(self, party: str) -> Ledger:
        """Return the ledger of a party.

        Args:
            party: The party.
        """
        return Ledger(self.folder / f"{party}.jsonl")


class Budget:
    """Pays for the rounds of one party in one run.

    Args:
        purse: The site's.
        party: The party.
        run_id: The run.
        folder: The party's own folder in the run: its key, and the last line of the ledger that it saw, are kept here.
        trained: Rounds of which the folder holds the party's state; they must have been paid for.
    """

    def __init__(self, purse: Purse, *, party: str, run_id: str, folder: Path, trained: Sequence[int] = ()) -> None:
        self._purse, self._party, self._run, self._folder = purse, party, run_id, folder
        self._ledger = purse.ledger(party)
        self._seen = folder / "ledger.json"
        paid = {charge.round for charge in self._charges() if charge.run == run_id}
        if unpaid := [number for number in trained if number and number not in paid]:
            raise StateLost(
                "LEDGER_BROKEN",
                f"the party has trained in round {max(unpaid)} of this run, which the ledger does not have",
                where=str(self._ledger.path),
                fix="put the ledger back as it was; what has been spent cannot be known without it",
            )

    def open_round(self, number: int, inputs: str, terms: Terms) -> NoiseStream:
        """Return the noise of a round, after it has been paid for durably.

        A round that begins again from the same inputs has the same noise, and is paid for once. From other inputs it
        is another release, with other noise and a charge of its own: with the old noise the two would differ by what
        the data say.

        Args:
            number: The round.
            inputs: Digest of all that its training starts from.
            terms: What the job asks.

        Raises:
            BudgetExhausted: `BUDGET_EXHAUSTED` or `BUDGET_OTHER_UNIT`; nothing was charged and nothing was drawn.
            StateLost: `LEDGER_BROKEN`.
        """
        key = noise_key(self._folder / "noise.key")
        rate, noise, steps = terms.round.sampling_rate, terms.round.noise_multiplier, terms.round.steps
        column = terms.group_by
        charge = Charge(terms.data, terms.unit, self._run, number, inputs, key_name(key), rate, noise, steps, column)
        check = partial(self._check, number=number, terms=terms)
        before = self._ledger.head()
        head = self._ledger.add(charge, seen=self._seen_heads(), check=check)
        if head != before:
            self._purse.note(number, head)
        write_atomic(self._seen, json.dumps({"hash": head}).encode())
        return NoiseStream(key, self._run, self._party, number, inputs)

    def spent(self, terms: Terms) -> float:
        """Return the epsilon of what this run has spent so far.

        Args:
            terms: What the job asks.
        """
        return self._epsilon(self._of_run(self._charges()), terms)

    def spent_by_all(self, terms: Terms) -> float:
        """Return the epsilon of what all runs have spent on the same data.

        Args:
            terms: What the job asks.

        Raises:
            BudgetExhausted: `BUDGET_OTHER_UNIT`.
        """
        return self._epsilon(_by_all(self._charges(), terms), terms)

    def _check(self, charges: list[Charge], number: int, terms: Terms) -> None:
        limits = (
            (terms.epsilon, self._of_run(charges), "this run, `privacy.differential_privacy.epsilon`"),
            (self._purse.max_epsilon, _by_all(charges, terms), "all runs on the same data, `limits.max_epsilon`"),
        )
        for most, mechanisms, whose in limits:
            if most is not None and (spent := self._epsilon(mechanisms, terms)) > most * (1 + _SLACK):
                raise BudgetExhausted(
                    "BUDGET_EXHAUSTED",
                    f"with this round epsilon would be {spent:.3f}, and {most:g} is the most for {whose}",
                    where=f"party {self._party}, round {number}",
                    fix="run fewer rounds, lower epsilon, or ask the site for a larger `limits.max_epsilon`",
                )

    def _charges(self) -> list[Charge]:
        return self._ledger.charges(seen=self._seen_heads())

    def _of_run(self, charges: Sequence[Charge]) -> list[Mechanism]:
        return [charge.mechanism for charge in charges if charge.run == self._run]

    def _seen_heads(self) -> tuple[str, str]:
        own = json.loads(self._seen.read_text(encoding="utf-8"))["hash"] if self._seen.exists() else ""
        return self._purse.noted, str(own)

    def _epsilon(self, mechanisms: Sequence[Mechanism], terms: Terms) -> float:
        return epsilon_of(mechanisms, delta=terms.delta, accountant=terms.accountant)


def _by_all(charges: Sequence[Charge], terms: Terms) -> list[Mechanism]:
    return spent_on(charges, terms.data, unit=terms.unit, group_by=terms.group_by)
