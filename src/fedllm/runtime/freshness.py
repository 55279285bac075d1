"""What keeps an old message from being taken for a new one, also after a restart."""

from __future__ import annotations

import json
from pathlib import Path

from fedllm.errors import PayloadError, StateLost
from fedllm.runs.jsonl import write_json

# A message's number is the server's start (epoch) and, below these bits, a count within it.
EPOCH_BITS = 32


class Freshness:
    """Lets each number of a message pass once, and only above all that passed before.

    The epoch of the newest one is kept in a file, so a party that starts again takes nothing of that epoch or before.

    Args:
        path: The file; without one, what passed is forgotten with the process.

    Raises:
        StateLost: `STATE_CORRUPT`, the file cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._epoch = _read(path) if path else -1
        self._newest = ((self._epoch + 1) << EPOCH_BITS) - 1

    def take(self, sequence: int, *, party: str) -> None:
        """Return if a number is new. Only what is known to come from the server may be shown to it.

        Args:
            sequence: The number in the message's envelope.
            party: Whom the message is for, for the error.

        Raises:
            PayloadError: `REPLAYED`.
            ResourceError: `DISK_FULL`; the number is not taken.
        """
        if sequence <= self._newest:
            raise PayloadError("REPLAYED", f"message {sequence} came after message {self._newest}", where=party)
        epoch = sequence >> EPOCH_BITS
        if self._path and epoch > self._epoch:
            # Before anything is done on its word.
            write_json(self._path, {"epoch": epoch})
        self._epoch, self._newest = epoch, sequence


def _read(path: Path) -> int:
    if not path.exists():
        return -1
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["epoch"])
    except (OSError, ValueError, KeyError, TypeError):
        raise StateLost(
            "STATE_CORRUPT",
            "the file that keeps old messages from being taken for new ones cannot be read",
            where=str(path),
            fix="restore it from a backup; without one, ask the coordinator for a new run",
        ) from None
