"""The seam under `ask` and `total`: a link carries bytes to parties and brings bytes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedllm.wire.payload import Manifest, Payload

# Room for the JSON header beside the tensors.
HEADROOM_BYTES = 2**20
SERVER = "server"


class Link(Protocol):
    """Carries messages between the server and the parties. It does not look into them."""

    @property
    def parties(self) -> tuple[str, ...]:
        """The parties that can be reached, in the job's order."""
        ...

    def exchange(self, messages: Mapping[str, bytes], *, timeout_s: float) -> Iterator[tuple[str, bytes | None]]:
        """Yield (party, answer) as answers arrive; None for a party that did not answer in time.

        Args:
            messages: One message per party.
            timeout_s: How long a party may work on its message, in seconds.
        """
        ...

    def close(self) -> None:
        """Let go of processes and connections."""
        ...


class Hello(Payload):
    """Server -> parties, first of all: what do you hold, and which of these committed rounds can you go on from?

    `trained[party][i]` is the last round in which the party had trained as of `rounds[i]`; 0 for never.
    """

    rounds: list[int]
    trained: dict[str, list[int]]


class Ready(Payload):
    """Party -> server: digests of what must be equal everywhere, and the rounds it can go on from."""

    base_digest: str
    tokenizer_digest: str
    template_digest: str
    common_digest: str
    manifest: Manifest
    versions: dict[str, str]
    rounds: list[int]


class Restore(Payload):
    """Server -> parties: go on from your state as of this round, and forget what came after it; -1: begin anew."""

    committed_round: int
    trained: dict[str, int]


class Done(Payload):
    """Party -> server: it is done."""


HANDSHAKE: dict[str, type[Payload]] = {cls.__name__: cls for cls in (Hello, Ready, Restore, Done)}


@dataclass
class Timings:
    """Where a round's time goes at the server, in seconds."""

    wait: float = 0.0
    aggregate: float = 0.0
