"""The link within one process: parties take turns on one base model. Everything still travels as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedllm.runtime.base import Link, Wanted
from fedllm.runtime.host import PartyHost
from fedllm.wire.frame import Parcel


class InProcessLink(Link):
    """Hands each message to its party's host, one after another. See `fedllm.runtime.base.Link`."""

    def __init__(self, hosts: Mapping[str, PartyHost], *, order: tuple[str, ...] | None = None) -> None:
        self._hosts = dict(hosts)
        self._order = order or tuple(hosts)

    @property
    def parties(self) -> tuple[str, ...]:
        """The parties, in the job's order."""
        return tuple(self._hosts)

    def exchange(
        self, messages: Mapping[str, Parcel], *, timeout_s: float, wanted: Wanted
    ) -> Iterator[tuple[str, Parcel | None]]:
        """Yield each party's answer in turn.

        Args:
            messages: One message per party.
            timeout_s: How long a party may work; the party itself gives up then.
            wanted: Not asked: tensors come along.
        """
        for party in self._order:
            if party in messages:
                yield party, self._hosts[party].handle(messages[party], timeout_s=timeout_s)

    def close(self) -> None:
        """Nothing is held."""
