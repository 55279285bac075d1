"""The link within one process: parties take turns on one base model. Everything still travels as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedllm.runtime.host import PartyHost


class InProcessLink:
    """Hands each message to its party's host, one after another. See `fedllm.runtime.base.Link`."""

    def __init__(self, hosts: Mapping[str, PartyHost], *, order: tuple[str, ...] | None = None) -> None:
        self._hosts = dict(hosts)
        self._order = order or tuple(hosts)

    @property
    def parties(self) -> tuple[str, ...]:
        """The parties, in the job's order."""
        return tuple(self._hosts)

    def exchange(self, messages: Mapping[str, bytes], *, timeout_s: float) -> Iterator[tuple[str, bytes | None]]:
        """Yield each party's answer in turn.

        Args:
            messages: One message per party.
            timeout_s: How long a party may work; the party itself gives up then.
        """
        for party in self._order:
            if party in messages:
                yield party, self._hosts[party].handle(messages[party], timeout_s=timeout_s)

    def close(self) -> None:
        """Nothing is held."""
