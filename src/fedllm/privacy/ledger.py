"""What of a party's data has been spent, in a file that is written before the noise is drawn and spans all runs.

A line per round that was trained with noise. Each line holds the hash of the one before it, and the last hash is kept
in a second file and in the folder of each run, so that a ledger that was deleted, shortened or changed is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fedllm.data.tokens import TokenisedExample
from fedllm.disk import hold, make_private, write_atomic
from fedllm.errors import StateLost
from fedllm.privacy.accountant import Mechanism

_FIRST = "0" * 64
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Charge:
    """One round's noisy sums over a party's data.

    Args:
        data: Digest of the training examples.
        unit: Whose traces are hidden: `example` or `group`.
        run: The run.
        round: The round.
        inputs: Digest of all that the round starts from.
        noise: Name of the key that the noise is drawn by.
        sampling_rate: As in `Mechanism`.
        noise_multiplier: As in `Mechanism`.
        steps: As in `Mechanism`.
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

    @property
    def mechanism(self) -> Mechanism:
        """What was done to the data."""
        return Mechanism(self.sampling_rate, self.noise_multiplier, self.steps)


def data_digest(examples: Iterable[TokenisedExample]) -> str:
    """Return the SHA-256 of training examples, whatever their order.

    Args:
        examples: A party's.
    """
    each = sorted(
        hashlib.sha256(repr((example.input_ids, example.loss_mask, example.label)).encode()).digest()
        for example in examples
    )
    return hashlib.sha256(b"".join(each)).hexdigest()


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
                body = {field.name: row[field.name] for field in fields(Charge)}
                whole = row == body | {"before": chain[-1] if chain else _FIRST, "hash": _hash(row["before"], body)}
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                raise _broken(self.path, f"line {number} is not as it was written")
            charges.append(Charge(**body))
            chain.append(row["hash"])
        return charges, chain


def spent_on(charges: Sequence[Charge], data: str) -> list[Mechanism]:
    """Return what was done to a party's data, over all runs.

    Args:
        charges: Of the ledger.
        data: Digest of the data.
    """
    return [charge.mechanism for charge in charges if charge.data == data]


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":"), sort_keys=True).encode() + b"\n"


def _hash(before: str, body: dict[str, Any]) -> str:
    return hashlib.sha256(before.encode() + _line(body)).hexdigest()


def _broken(path: Path, what: str) -> StateLost:
    fix = "put the file back as it was; what has been spent cannot be known without it"
    return StateLost("LEDGER_BROKEN", f"the ledger of spent privacy is not whole: {what}", where=str(path), fix=fix)
