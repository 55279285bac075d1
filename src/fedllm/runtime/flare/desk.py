"""A party's end of the channel: requests in, one at a time; answers out; and a sign of life every second."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from queue import Queue
from typing import Protocol

from fedllm.errors import PayloadError
from fedllm.runtime.base import SERVER
from fedllm.runtime.flare.channel import Channel, Topic
from fedllm.runtime.flare.lines import Lines
from fedllm.runtime.flare.link import BEAT_S, call_s, enclosed, opened
from fedllm.runtime.flare.pieces import Offers, Way
from fedllm.wire.blob import Blob, Buffer
from fedllm.wire.frame import Parcel

_log = logging.getLogger("fedllm.party")


class Answers(Protocol):
    """A party of a run, or what stands for one that will not take part."""

    def handle(self, parcel: Parcel, *, timeout_s: float) -> Parcel:
        """Return the answer to one message."""
        ...

    def close(self) -> None:
        """Let go of the party's folder."""
        ...


class Desk:
    """Takes requests from the server, and holds the last answer's tensors until the next request.

    Args:
        channel: To the server.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.way = Way(channel)
        self._posts: Queue[Buffer] = Queue()
        self._last_token = b""
        self._said: dict[str, str | int] = {}
        self._stop = threading.Event()
        self._offers = Offers(channel)
        self.say("starting")
        channel.serve(Topic.POST, self._on_post)

    def say(self, stage: str, step: int = 0, num_steps: int = 0) -> None:
        """Tell the server with the next sign of life what is going on.

        Args:
            stage: One of `link.STAGES`.
            step: Steps done.
            num_steps: Steps of the round.
        """
        self._said = {"stage": stage, "step": step, "num_steps": num_steps}

    def close(self) -> None:
        """Take no more requests, and give up what is being delivered."""
        self._stop.set()
        self._posts.put(b"")
        if self.way.lines:
            self.way.lines.close()

    def use(self, lines: Lines) -> None:
        """Give and get tensors over direct lines from now on.

        Args:
            lines: To the server.
        """
        self.way = Way(self.channel, lines)
        lines.serve(self._offers.find)

    def is_closed(self) -> bool:
        """Return whether it was closed."""
        return self._stop.is_set()

    def serve(self, open_party: Callable[[], Answers]) -> None:
        """Answer requests until it is closed.

        Args:
            open_party: Makes ready whoever answers.
        """
        threading.Thread(target=self._beat, daemon=True, name="beat").start()
        self.say("loading")
        party = open_party()
        try:
            self._answer_all(party)
        finally:
            party.close()

    def _answer_all(self, party: Answers) -> None:
        self.say("ready")
        held: Blob | None = None
        while body := self._next():
            self._let_go(held)
            held = None
            token, timeout_s, parcel = opened(body)
            try:
                answer = party.handle(parcel, timeout_s=timeout_s)
            except PayloadError as error:
                _log.error("something that is no message was passed over: %s", error)
                continue
            self.say("answering")
            reply, held = enclosed(token, 0.0, answer)
            if held:
                self._offers.offer(held, SERVER)
                if self.way.lines:
                    self.way.lines.need()
            self._deliver(reply)
            self.say("ready")

    def _next(self) -> Buffer:
        body = self._posts.get()
        return b"" if self._stop.is_set() else body

    def _let_go(self, held: Blob | None) -> None:
        if held:
            self._offers.withdraw([held])
            held.discard()

    def _on_post(self, _: str, body: Buffer) -> bytes:
        token = opened(body)[0]
        # The server asks again when it has not heard that its request arrived.
        if token != self._last_token:
            self._last_token = token
            self._posts.put(body)
        return b""

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            self.channel.call(SERVER, Topic.BEAT, json.dumps(self._said).encode(), timeout_s=BEAT_S)

    def _deliver(self, body: bytes) -> None:
        while not self._stop.is_set():
            if self.channel.call(SERVER, Topic.DONE, body, timeout_s=call_s(body)) is not None:
                return
            time.sleep(BEAT_S)
