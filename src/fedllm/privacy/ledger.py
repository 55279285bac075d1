"""What of a party's data has been spent, in a file that is written before the noise is drawn and spans all runs.

A line per round that was trained with noise. Each line holds the hash of the one before it, and the last hash is kept
in a second file and in the folder of each run, so that a ledger that was deleted, shortened or changed is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fedllm.data.rows import DIGEST_KIND
from fedllm.disk import hold, make_private, write_atomic
from fedllm.errors import BudgetExhausted, StateLost
from fedllm.privacy.accountant import Mechanism

_FIRST = "0" * 64
_PATIENCE_S = 60.0
# What hides one of these hides all before it: a person's records are among a party's.
_UNITS = ("example", "group", "party")


@dataclass(frozen=True)
class Charge:
    """One round's noisy sums over a party's data.

    Args:
        data: Digest of the raw rows of the party's data.
        unit: Whose traces are hidden: `example`, `group` or `party`.
        run: The run.
        round: The round.
        inputs: Digest of all that the round starts from.
        noise: Name of the key that the noise is drawn by.
        sampling_rate: As in `Mechanism`.
        noise_multiplier: As in `Mechanism`.
        steps: As in `Mechanism`.
        group_by: Column that named the person, where the unit is `group`; else empty.
    """

    data: str
    unit: str
    run: str
    round: int
    inputs: str
    noise: str
    sampling_rate: float
    noise_multiplier: float
    steps: int
    group_by: str = ""

    @property
    def mechanism(self) -> Mechanism:
        """What was done to the data."""
        return Mechanism(self.sampling_rate, self.noise_multiplier, self.steps)


class Ledger:
    """The charges of one party.

    Args:
        path: The file; its head is kept beside it, in `NAME.head.json`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._head = path.with_name(path.stem + ".head.json")

    def charges(self, *, seen: Sequence[str] = ()) -> list[Charge]:
        """Return all charges, oldest first.

        Args:
            seen: Heads that this ledger had before; they must be among its lines.

        Raises:
            StateLost: `LEDGER_BROKEN`.
        """
        charges, chain = self._read()
        for head in (self._kept_head(), *seen):
            if head and head not in chain:
                raise _broken(self.path, f"it does not hold the line {head[:12]}, which it had before")
        return charges

    def head(self) -> str:
        """Return the hash of the last line; empty where there is none."""
        chain = self._read()[1]
        return chain[-1] if chain else ""

    def add(
        self, charge: Charge, *, seen: Sequence[str] = (), check: Callable[[list[Charge]], None] = lambda charges: None
    ) -> str:
        """Write a charge durably, unless it is there already, and return the hash of the last line.

        Args:
            charge: The charge.
            seen: As for `charges`.
            check: Is given all charges with the new one, and raises where they are too many. No other run can pay
                between its look and the charge.

        Raises:
            StateLost: `LEDGER_BROKEN`.
            ResourceError: `DISK_FULL`; nothing was charged then.
        """
        make_private(self.path.parent)
        what, fix = "another process is writing this ledger", "wait for it, or stop it"
        lock = hold(self.path.with_suffix(".lock"), what, fix=fix, patience_s=_PATIENCE_S)
        try:
            charges = self.charges(seen=seen)
            if charge in charges:
                return self.head()
            check([*charges, charge])
            body = asdict(charge)
            last = self.head() or _FIRST
            hash_ = _hash(last, body)
            before = self.path.read_bytes() if self.path.exists() else b""
            # First the charge, then the head: one that lags behind is found among the lines.
            write_atomic(self.path, before + _line(body | {"before": last, "hash": hash_}))
            write_atomic(self._head, _line({"hash": hash_}))
            return hash_
        finally:
            lock.close()

    def _kept_head(self) -> str:
        if not self._head.exists():
            return ""
        try:
            return str(json.loads(self._head.read_text(encoding="utf-8"))["hash"])
        except (ValueError, KeyError, TypeError):
            raise _broken(self._head, "it is no head of a ledger") from None

    def _read(self) -> tuple[list[Charge], list[str]]:
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        charges: list[Charge] = []
        chain: list[str] = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                body = _body(row)
                whole = row == body | {"before": chain[-1] if chain else _FIRST, "hash": _hash(row["before"], body)}
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                raise _broken(self.path, f"line {number} is not as it was written")
            charges.append(Charge(**body))
            chain.append(row["hash"])
        return charges, chain


def spent_on(charges: Sequence[Charge], data: str, *, unit: str, group_by: str = "") -> list[Mechanism]:
    """Return what was done to a unit of a party's data, over all runs.

    What hid a person hid each of its records as well, and what hid the party hid both. The other way round nothing is
    known: how many records a person has is not in the ledger.

    Args:
        charges: Of the ledger.
        data: Digest of the data.
        unit: Whose traces are to be hidden.
        group_by: Column that names the person, where the unit is `group`.

    Raises:
        BudgetExhausted: `BUDGET_OTHER_UNIT`.
    """
    found = [charge for charge in charges if _may_be_of(charge, data, unit)]
    other = next((charge for charge in found if not _hides(charge, unit, group_by)), None)
    if other is None:
        return [charge.mechanism for charge in found]
    raise BudgetExhausted(
        "BUDGET_OTHER_UNIT",
        f"run {other.run} has trained on the same data and hid {_named(other.unit, other.group_by)}; what that has "
        f"told of {_named(unit, group_by)} is not known",
        where=f"round {other.round} of that run",
        fix=f"hide {_named(other.unit, other.group_by)} here too, or train on data that it did not have",
    )


def _may_be_of(charge: Charge, data: str, unit: str) -> bool:
    """Return whether a charge may be for rows of some data; what cannot be told counts."""
    is_known = charge.data.startswith(DIGEST_KIND) and data.startswith(DIGEST_KIND)
    return charge.data == data or "party" in (charge.unit, unit) or not is_known


def _hides(charge: Charge, unit: str, group_by: str) -> bool:
    """Return whether a charge bounds what is known of a unit."""
    if charge.unit == unit:
        return charge.group_by == group_by
    return _UNITS.index(charge.unit) > _UNITS.index(unit)


def _named(unit: str, group_by: str) -> str:
    persons = "all examples of a person" + (f" (column {group_by!r})" if group_by else "")
    return {"example": "single examples", "group": persons, "party": "the whole party"}[unit]


def _body(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a line says of its charge; a field that came later may be missing in an old one."""
    known = (field for field in fields(Charge) if field.name in row or field.default is MISSING)
    return {field.name: row[field.name] for field in known}


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":"), sort_keys=True).encode() + b"\n"


def _hash(before: str, body: dict[str, Any]) -> str:
    return hashlib.sha256(before.encode() + _line(body)).hexdigest()


def _broken(path: Path, what: str) -> StateLost:
    fix = "put the file back as it was; what has been spent cannot be known without it"
    return StateLost("LEDGER_BROKEN", f"the ledger of spent privacy is not whole: {what}", where=str(path), fix=fix)
