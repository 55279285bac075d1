"""The seam under `ask` and `total`: a link carries bytes to parties and brings bytes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field

from fedllm.wire.blob import Blob, Buffer, in_memory
from fedllm.wire.frame import Frame, Parcel
from fedllm.wire.payload import Manifest, Payload, TensorMap

# Room for the JSON header beside the tensors.
HEADROOM_BYTES = 2**20
SERVER = "server"


# (party, answer as it came) -> the answer taken apart if its tensors are still to be fetched, and are worth it.
Wanted = Callable[[str, Parcel], Frame | None]


@dataclass(frozen=True)
class Seal:
    """How messages between machines are signed: `sign(text)`, and `verify(sender, text, signature)`, which raises."""

    sign: Callable[[bytes], bytes]
    verify: Callable[[str, bytes, bytes], None]


class Link(Protocol):
    """Carries messages between the server and the parties. It does not look into them.

    Within one machine messages are not signed and tensors stay in memory; a link between machines says otherwise.
    """

    @property
    def seal(self) -> Seal | None:
        """How messages are signed and verified; None within one machine."""
        return None

    @property
    def parties(self) -> tuple[str, ...]:
        """The parties that can be reached, in the job's order."""
        ...

    def keep(self, parts: Iterable[Buffer]) -> Blob:
        """Return a request's tensors as a blob, for as long as the request is out.

        Args:
            parts: The blob's bytes in pieces.
        """
        return in_memory(parts)

    def exchange(
        self, messages: Mapping[str, Parcel], *, timeout_s: float, wanted: Wanted
    ) -> Iterator[tuple[str, Parcel | None]]:
        """Yield (party, answer) as answers arrive whole; None for a party that did not answer in time.

        Args:
            messages: One message per party.
            timeout_s: How long a party may work on its message, in seconds.
            wanted: Says which tensors to fetch where they do not come along with an answer.
        """
        ...

    def close(self) -> None:
        """Let go of processes and connections."""
        ...


def max_message_bytes(manifest: Manifest) -> int:
    """Return the length of the longest message that is accepted, tensors included.

    Args:
        manifest: The adapter's names, dtypes and shapes.
    """
    # An update, a control variate, and what a meter needs, each value in up to 64 bits.
    return 6 * sum(spec.num_bytes for spec in manifest.values()) + 16 * HEADROOM_BYTES


class Hello(Payload):
    """Server -> parties, first of all: what do you hold, and which of these committed rounds can you go on from?

    `trained[party][i]` is the last round in which the party had trained as of `rounds[i]`; 0 for never.
    """

    rounds: list[int]
    trained: dict[str, list[int]]


class Ready(Payload):
    """Party -> server: digests of what must be equal everywhere, and the rounds it can go on from.

    `manifest` is the adapter's, and `beside` that of what may travel beside it.
    """

    base_digest: str
    tokenizer_digest: str
    template_digest: str
    common_digest: str
    manifest: Manifest
    beside: Manifest = Field(default_factory=dict)
    versions: dict[str, str]
    rounds: list[int]

    def tensors(self) -> Manifest:
        """Return all that may travel in a request."""
        return {**self.manifest, **self.beside}


class Restore(Payload):
    """Server -> parties: go on from your state as of this round, and forget what came after it; -1: begin anew."""

    committed_round: int
    trained: dict[str, int]


class Done(Payload):
    """Party -> server: it is done."""


class Head(BaseModel):
    """The newest line of an audit log."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    n: int = Field(ge=-1)
    hash: str = Field(pattern=r"^[0-9a-f]{64}$")


class Witness(Payload):
    """Server <-> parties, after each round: the newest lines of the audit logs that the sender knows of, its own too.

    Who notes them can later show that such a log was cut off, or written anew.
    """

    heads: dict[str, Head]


class Copy(Payload):
    """Server -> one party, at the end: its own copy of the adapter, with a mark by which a leak is traced."""

    adapter: TensorMap


class ShowCommitment(Payload):
    """Server -> parties, before round 0 of a model that is claimed: show your key, and what you commit to."""


class Shown(Payload):
    """Party -> server: its public key for the log of commitments; a claimant's commitment as JSON, else empty."""

    public_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    commitment: str = Field(max_length=4096)


class SignHead(Payload):
    """Server -> parties, before round 0 and after each round: sign the head of the log of commitments.

    `entries` are those after the first `since`, which the party has signed, and `signatures` are all parties' of the
    head of that size: so each party keeps what all have signed.
    """

    head: str = Field(max_length=1024)
    since: int = Field(ge=0)
    entries: list[str]
    signatures: dict[str, str]


class HeadSigned(Payload):
    """Party -> server: its signature of the head, hex; of the first head also its share, see `ownership.directions`."""

    signature: str = Field(pattern=r"^[0-9a-f]{128}$")
    share: str = Field("", pattern=r"^([0-9a-f]{128})?$")


_ABOUT_CLAIMS = (ShowCommitment, Shown, SignHead, HeadSigned)
HANDSHAKE: dict[str, type[Payload]] = {
    cls.__name__: cls for cls in (Hello, Ready, Restore, Done, Witness, Copy, *_ABOUT_CLAIMS)
}


@dataclass
class Timings:
    """Where a round's time goes at the server, in seconds."""

    wait: float = 0.0
    aggregate: float = 0.0
