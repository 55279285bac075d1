"""The byte ledger: what was really encoded, per round and party."""

from __future__ import annotations

from collections import Counter


class ByteLedger:
    """Counts the bytes of each message as it is encoded."""

    def __init__(self) -> None:
        self._bytes: Counter[tuple[int, str, str]] = Counter()
        self._saved: Counter[tuple[int, str]] = Counter()

    def add(self, *, round_: int, party: str, direction: str, num_bytes: int) -> None:
        """Count one message.

        Args:
            round_: The round it belongs to.
            party: The party at the other end.
            direction: `up` (party to server) or `down`.
            num_bytes: Its length.
        """
        self._bytes[round_, party, direction] += num_bytes

    def of_round(self, round_: int) -> dict[tuple[str, str], int]:
        """Return (party, direction) -> bytes for one round.

        Args:
            round_: The round.
        """
        return {(party, way): count for (at, party, way), count in self._bytes.items() if at == round_}

    def save(self, *, round_: int, party: str, num_bytes: int) -> None:
        """Count what a change on its way down was shorter than the tensors that it leads to.

        Args:
            round_: The round it belongs to.
            party: The receiver.
            num_bytes: By how many bytes.
        """
        self._saved[round_, party] += num_bytes

    def saved_in(self, round_: int) -> dict[str, int]:
        """Return party -> bytes saved on the way down in one round.

        Args:
            round_: The round.
        """
        return {party: count for (at, party), count in self._saved.items() if at == round_}
