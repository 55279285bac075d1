"""Channels without processes: two ends in one, with loss, delay, doubles, and cuts."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fedllm.runtime.base import SERVER, Seal
from fedllm.runtime.federation import LinkedFederation
from fedllm.runtime.flare.channel import Channel, Topic
from fedllm.runtime.flare.desk import Answers, Desk
from fedllm.runtime.flare.link import FlareLink
from fedllm.wire.blob import Buffer
from fedllm.wire.spool import Spool

Handler = Callable[[str, Buffer], Buffer]


@dataclass
class Air:
    """What lies between the ends. `bad(caller, peer, topic, body)` says whether a call gets lost on the way there."""

    bad: Callable[[str, str, Topic, Buffer], bool] = lambda caller, peer, topic, body: False
    lost: float = 0.0
    doubled: float = 0.0
    delay_s: float = 0.0
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    handlers: dict[tuple[str, Topic], Handler] = field(default_factory=dict)
    calls: Counter[tuple[str, str, Topic]] = field(default_factory=Counter)
    sent: Counter[tuple[str, str, Topic]] = field(default_factory=Counter)
    answered: Counter[tuple[str, str, Topic]] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def carry(self, caller: str, peer: str, topic: Topic, body: Buffer) -> Buffer | None:
        key, body = (caller, peer, topic), bytes(body)
        with self.lock:
            self.calls[key] += 1
            self.sent[key] += len(body)
            lost = [self.draw.random() < self.lost for _ in range(2)]
            doubled = self.draw.random() < self.doubled
        handler = self.handlers.get((peer, topic))
        if handler is None or lost[0] or self.bad(caller, peer, topic, body):
            return None
        if self.delay_s:
            time.sleep(self.delay_s)
        answer = bytes(handler(caller, body))
        if doubled:
            answer = bytes(handler(caller, body))
        with self.lock:
            self.answered[key] += len(answer)
        return None if lost[1] else answer

    def channel(self, name: str, peers: list[str]) -> Channel:
        return cast(Channel, End(self, name, peers))


@dataclass
class End:
    """One end, with the methods of a `Channel`."""

    air: Air
    name: str
    names: list[str]
    job_id: str = "0b0f7c1e"

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(self.names)

    def serve(self, topic: Topic, answer: Handler) -> None:
        self.air.handlers[self.name, topic] = answer

    def call(self, peer: str, topic: Topic, body: Buffer, *, timeout_s: float) -> Buffer | None:
        return self.air.carry(self.name, peer, topic, body)


@dataclass
class Net:
    """A server and its parties, each at its desk in a thread."""

    air: Air
    link: FlareLink
    desks: dict[str, Desk]
    late: list[str]

    def federation(self, **options: Any) -> LinkedFederation:
        return LinkedFederation(self.link, **options)


@contextmanager
def net(
    folder: Path,
    open_party: Mapping[str, Callable[[Desk], Answers]],
    *,
    air: Air | None = None,
    seal: Seal | None = None,
) -> Iterator[Net]:
    """Yield a server and parties that are joined; everything ends with the block.

    Args:
        folder: For the server's spool.
        open_party: By name: given its desk, what answers.
        air: What lies between them.
        seal: The server's.
    """
    air, late = air or Air(), list[str]()
    desks = {name: Desk(air.channel(name, [SERVER])) for name in open_party}
    spool = Spool(folder / SERVER)
    link = FlareLink(air.channel(SERVER, list(open_party)), spool=spool, seal=seal, on_stale=late.append)
    threads = [
        threading.Thread(target=desks[name].serve, args=(lambda name=name: open_party[name](desks[name]),))
        for name in open_party
    ]
    for thread in threads:
        thread.start()
    try:
        yield Net(air, link, desks, late)
    finally:
        link.close()
        for desk in desks.values():
            desk.close()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
