"""The link to parties at other machines: requests are posted, answers come back on their own, silence is noticed."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, Queue

from fedllm.errors import RunPaused
from fedllm.runtime.base import Link, Wanted
from fedllm.runtime.flare.channel import Channel, Topic
from fedllm.wire.frame import Parcel, join, split

# A party's process reports every BEAT_S seconds; after LOST_S without a report it is taken for dead.
BEAT_S = 1.0
LOST_S = 15.0
START_S = 120.0
_GRACE_S = 5.0
_RETRY_S = 0.2
_CALL_S = 10.0
HEAD = struct.Struct("<Qd")


@dataclass
class Seen:
    """What a party last said of itself."""

    at: float
    stage: str = "starting"
    step: int = 0
    num_steps: int = 0


class FlareLink(Link):
    """Sends each message to its party's process. See `fedllm.runtime.base.Link`."""

    def __init__(self, channel: Channel, *, aborted: Callable[[], bool]) -> None:
        self._channel, self._aborted = channel, aborted
        self._number = 0
        self._answers: Queue[tuple[int, str, bytes]] = Queue()
        self._pool = ThreadPoolExecutor(max_workers=len(channel.peers), thread_name_prefix="post")
        self._closed = threading.Event()
        started = time.monotonic()
        self.seen = {party: Seen(started + START_S - LOST_S) for party in channel.peers}
        self.waiting: dict[str, float] = {}
        channel.serve(Topic.DONE, self._on_done)
        channel.serve(Topic.BEAT, self._on_beat)

    @property
    def parties(self) -> tuple[str, ...]:
        """The parties, in the job's order."""
        return self._channel.peers

    def exchange(
        self, messages: Mapping[str, Parcel], *, timeout_s: float, wanted: Wanted
    ) -> Iterator[tuple[str, Parcel | None]]:
        """Yield each party's answer as it arrives; None for one that is late.

        Args:
            messages: One message per party.
            timeout_s: How long a party may work on its message.
            wanted: Not asked: tensors come along.

        Raises:
            RunPaused: `PARTY_LOST`, a party's process is gone; `INTERRUPTED`, the job is being stopped.
        """
        self._number += 1
        number, due = self._number, time.monotonic() + timeout_s + _GRACE_S
        self.waiting = dict.fromkeys(messages, time.time())
        for party, parcel in messages.items():
            self._pool.submit(self._post, party, HEAD.pack(number, timeout_s) + join(parcel), due)
        while self.waiting:
            try:
                answered, party, data = self._answers.get(timeout=_RETRY_S)
            except Empty:
                self._check()
                if time.monotonic() >= due:
                    late, self.waiting = list(self.waiting), {}
                    yield from ((party, None) for party in late)
                continue
            # An answer to an earlier exchange came too late to be used, and a second one is not counted.
            if answered == number and self.waiting.pop(party, None) is not None:
                yield party, split(data)

    def close(self) -> None:
        """Let go of the threads; the processes end with FLARE's job."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _post(self, party: str, body: bytes, due: float) -> None:
        # The party's process may still be on its way up.
        while not self._closed.is_set() and time.monotonic() < due:
            if self._channel.call(party, Topic.POST, body, timeout_s=_CALL_S) is not None:
                return
            time.sleep(_RETRY_S)

    def _on_done(self, party: str, body: bytes) -> bytes:
        number, _ = HEAD.unpack_from(body)
        self._answers.put((number, party, bytes(body[HEAD.size :])))
        return b""

    def _on_beat(self, party: str, body: bytes) -> bytes:
        told = json.loads(body)
        self.seen[party] = Seen(time.monotonic(), str(told["stage"]), int(told["step"]), int(told["num_steps"]))
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
