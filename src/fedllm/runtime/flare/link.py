"""The link to parties at other machines: requests are posted, answers come back on their own, silence is noticed."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import Empty, Queue

from fedllm.errors import PayloadError, RunPaused
from fedllm.runtime.base import Link, Seal, Wanted
from fedllm.runtime.flare.channel import Channel, Topic
from fedllm.runtime.flare.lines import Lines
from fedllm.runtime.flare.pieces import Offers, Way, asker
from fedllm.wire.blob import Blob, Buffer, in_place
from fedllm.wire.frame import Frame, Parcel, join, split
from fedllm.wire.spool import INLINE_BYTES, Spool, trim_memory

# A party's process reports every BEAT_S seconds; after LOST_S without a report it is taken for dead.
BEAT_S = 1.0
LOST_S = 15.0
START_S = 120.0
_GRACE_S = 5.0
_RETRY_S = 0.2
_CALL_S = 10.0
# What a call with a body may take longer than one without: no line is slower than so many bytes a second.
_SLOWEST_BYTES = 2**14
# So many answers are pulled at a time; the others wait at their parties.
_PULLS = 4
_REMEMBERED = 1000
# From this size of tensors on it is worth the time to give unused memory back after each round.
_LARGE_BYTES = 100 * 10**6
# What a party may say it is doing.
STAGES = frozenset({"starting", "loading", "ready", "training", "fetching", "answering"})
# A token drawn for each request and party, which the answer repeats; and the seconds that the party has.
HEAD = struct.Struct("<16sd")


def call_s(body: Buffer) -> float:
    """Return how long a call may take, in seconds.

    Args:
        body: What is sent.
    """
    return _CALL_S + len(body) / _SLOWEST_BYTES


def enclosed(token: bytes, timeout_s: float, parcel: Parcel) -> tuple[bytes, Blob | None]:
    """Return a message as one body, and its tensors if they are too large to travel in it.

    Args:
        token: The exchange it belongs to.
        timeout_s: How long the receiver may work on it, in seconds.
        parcel: The message.
    """
    apart = parcel.blob if parcel.blob and parcel.blob.size > INLINE_BYTES else None
    return HEAD.pack(token, timeout_s) + join(Parcel(parcel.head) if apart else parcel), apart


def opened(body: Buffer) -> tuple[bytes, float, Parcel]:
    """Return what `enclosed` made a body of. What is malformed comes out as a head that will be refused.

    Args:
        body: The body received.
    """
    token, timeout_s = HEAD.unpack_from(body)
    rest = memoryview(body)[HEAD.size :]
    try:
        return token, timeout_s, split(rest)
    except PayloadError:
        return token, timeout_s, Parcel(bytes(rest[:64]))


@dataclass
class Seen:
    """What a party last said of itself."""

    at: float
    stage: str = "starting"
    step: int = 0
    num_steps: int = 0


@dataclass(frozen=True)
class _Answer:
    """What came from a party; `pulled` once its tensors did. No parcel: they did not come in time."""

    token: bytes
    party: str
    parcel: Parcel | None
    pulled: bool = False


@dataclass
class _Exchange:
    """One round of requests: until when each party has time, and whose answer's tensors are being pulled."""

    tokens: dict[str, bytes]
    patience_s: float
    wanted: Wanted
    due: dict[str, float] = field(default_factory=dict)
    pulling: set[str] = field(default_factory=set)
    offered: list[Blob] = field(default_factory=list)
    over: bool = False

    def alive(self, party: str) -> None:
        self.due[party] = time.monotonic() + self.patience_s

    def is_late(self, party: str) -> bool:
        return party not in self.pulling and time.monotonic() >= self.due[party]


def _idle() -> _Exchange:
    return _Exchange({}, 0.0, lambda party, parcel: None)


class FlareLink(Link):
    """Sends each message to its party's process. See `fedllm.runtime.base.Link`.

    Args:
        channel: To the parties.
        spool: For tensors on their way.
        seal: How messages are signed and verified; None only where that is to be tested.
        aborted: Says when the job is being stopped.
        on_stale: Called with the name of a party whose answer came after the exchange that it belongs to.
        lines: Direct lines to the parties.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        spool: Spool,
        seal: Seal | None,
        aborted: Callable[[], bool] = lambda: False,
        on_stale: Callable[[str], None] = lambda party: None,
        lines: Lines | None = None,
    ) -> None:
        self._way = Way(channel, lines)
        self._channel, self._spool, self._seal = channel, spool, seal
        self._aborted, self._on_stale = aborted, on_stale
        self._now = _idle()
        self._missed: deque[bytes] = deque(maxlen=_REMEMBERED)
        self._inbox: Queue[_Answer | BaseException] = Queue()
        # A call to a process that is gone takes a while; it must not hold up the next request.
        self._posts = ThreadPoolExecutor(max_workers=2 * len(channel.peers), thread_name_prefix="post")
        self._pulls = ThreadPoolExecutor(max_workers=_PULLS, thread_name_prefix="pull")
        self._closed = threading.Event()
        started = time.monotonic()
        self.seen = {party: Seen(started + START_S - LOST_S) for party in channel.peers}
        self.waiting: dict[str, float] = {}
        self._offers = Offers(channel, on_piece=self._alive)
        if lines:
            lines.serve(self._offers.find)
        channel.serve(Topic.DONE, self._on_done)
        channel.serve(Topic.BEAT, self._on_beat)

    @property
    def parties(self) -> tuple[str, ...]:
        """The parties, in the job's order."""
        return self._channel.peers

    @property
    def seal(self) -> Seal | None:
        """How messages are signed and verified."""
        return self._seal

    def keep(self, parts: Iterable[Buffer]) -> Blob:
        """Return a request's tensors as a blob, the same for all parties; they stay where they are.

        Args:
            parts: The blob's bytes in pieces.
        """
        return in_place(parts)

    def exchange(
        self, messages: Mapping[str, Parcel], *, timeout_s: float, wanted: Wanted
    ) -> Iterator[tuple[str, Parcel | None]]:
        """Yield each party's answer as it arrives, its tensors pulled; None for one that is late.

        A party's time begins anew with each piece of the request's tensors that it pulls.

        Args:
            messages: One message per party.
            timeout_s: How long a party may work on its message.
            wanted: Says which tensors to pull.

        Raises:
            RunPaused: `PARTY_LOST`, a party's process is gone; `INTERRUPTED`, the job is being stopped.
            ResourceError: `DISK_FULL`.
        """
        tokens = {party: os.urandom(16) for party in messages}
        exchange = self._now = _Exchange(tokens, timeout_s + _GRACE_S, wanted)
        self.waiting = dict.fromkeys(messages, time.time())
        try:
            for party, parcel in messages.items():
                self._send(exchange, party, parcel, timeout_s)
            if any(blob.size > _LARGE_BYTES for blob in exchange.offered):
                # While the parties work, what the last round left unused goes back to the system.
                trim_memory()
            while self.waiting:
                yield from self._arrived(exchange)
        finally:
            exchange.over = True
            self._missed.extend(tokens[party] for party in self.waiting)
            self._offers.withdraw(exchange.offered)
            # The request's tensors lie where its sender has them; nothing here may keep them any longer.
            self._now = _idle()

    def close(self) -> None:
        """Let go of the threads; the processes end with FLARE's job."""
        self._closed.set()
        self._posts.shutdown(wait=False, cancel_futures=True)
        self._pulls.shutdown(wait=False, cancel_futures=True)
        if self._way.lines:
            self._way.lines.close()

    def _send(self, exchange: _Exchange, party: str, parcel: Parcel, timeout_s: float) -> None:
        exchange.alive(party)
        body, apart = enclosed(exchange.tokens[party], timeout_s, parcel)
        if apart:
            self._offers.offer(apart, party)
            exchange.offered.append(apart)
        self._posts.submit(self._post, exchange, party, body)

    def _post(self, exchange: _Exchange, party: str, body: bytes) -> None:
        # The party's process may still be on its way up.
        while not self._closed.is_set() and not exchange.over and party in self.waiting:
            if self._channel.call(party, Topic.POST, body, timeout_s=call_s(body)) is not None:
                return
            time.sleep(_RETRY_S)

    def _arrived(self, exchange: _Exchange) -> Iterator[tuple[str, Parcel | None]]:
        """Yield what is there to be handed on after waiting for a moment."""
        try:
            found = self._inbox.get(timeout=_RETRY_S)
        except Empty:
            self._check()
            for party in [party for party in self.waiting if exchange.is_late(party)]:
                self._missed.append(exchange.tokens[party])
                del self.waiting[party]
                yield party, None
            return
        if isinstance(found, BaseException):
            raise found
        if self._is_whole(exchange, found):
            del self.waiting[found.party]
            yield found.party, found.parcel

    def _is_whole(self, exchange: _Exchange, answer: _Answer) -> bool:
        """Return whether an answer is to be handed on now; if its tensors are still at the party, pull them."""
        party = answer.party
        if exchange.tokens.get(party) != answer.token:
            self._refuse_old(answer)
            return False
        if party not in self.waiting or (party in exchange.pulling and not answer.pulled):
            # A second answer is not counted.
            return False
        if answer.pulled or answer.parcel is None:
            return True
        frame = exchange.wanted(party, answer.parcel)
        if frame is None:
            return True
        exchange.pulling.add(party)
        self._pulls.submit(self._pull, exchange, answer, frame).add_done_callback(self._pulled)
        return False

    def _refuse_old(self, answer: _Answer) -> None:
        if answer.parcel and answer.parcel.blob:
            answer.parcel.blob.discard()
        # A token that was never given out is not the party's: anyone at the other end could have made it up.
        if answer.token in self._missed:
            self._missed.remove(answer.token)
            self._on_stale(answer.party)

    def _pull(self, exchange: _Exchange, answer: _Answer, frame: Frame) -> _Answer:
        ask = asker(self._way, answer.party, frame.blob_digest, on_piece=self._alive)
        try:
            blob = self._spool.pull(
                frame.blob_digest,
                frame.blob_size,
                sender=answer.party,
                ask=ask,
                cancelled=lambda: exchange.over or self._closed.is_set(),
            )
        except PayloadError as error:
            # Without its tensors the answer is refused by whoever reads it.
            parcel = None if error.code == "ROUND_TIMEOUT" else answer.parcel
            return replace(answer, parcel=parcel, pulled=True)
        assert answer.parcel is not None  # noqa: S101
        return replace(answer, parcel=replace(answer.parcel, blob=blob), pulled=True)

    def _pulled(self, done: Future[_Answer]) -> None:
        if not done.cancelled():
            self._inbox.put(done.exception() or done.result())

    def _alive(self, party: str) -> None:
        self.seen[party].at = max(self.seen[party].at, time.monotonic())
        self._now.alive(party)

    def _on_done(self, party: str, body: Buffer) -> bytes:
        token, _, parcel = opened(body)
        self._inbox.put(_Answer(token, party, parcel))
        return b""

    def _on_beat(self, party: str, body: Buffer) -> bytes:
        told = json.loads(bytes(body))
        stage = told["stage"] if told["stage"] in STAGES else "working"
        self.seen[party] = Seen(time.monotonic(), stage, int(told["step"]), int(told["num_steps"]))
        return b""

    def _check(self) -> None:
        if self._aborted() or self._closed.is_set():
            raise RunPaused("INTERRUPTED", "the job is being stopped", fix="`fedllm resume RUN`")
        lost = [party for party in self.waiting if time.monotonic() - self.seen[party].at > LOST_S]
        if lost:
            raise RunPaused(
                "PARTY_LOST",
                f"no sign of life from {', '.join(lost)} for {LOST_S:.0f} s",
                fix="it is tried again by itself once the party's process is back",
            )
