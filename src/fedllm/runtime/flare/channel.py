"""Bytes between the two halves of a run over FLARE's cells: which cell is which party, calls with deadlines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message

from fedllm.wire.blob import Buffer

_CHANNEL = "fedllm"
_log = logging.getLogger(__name__)


class Topic(StrEnum):
    """Everything that one half may call the other for."""

    POST = "post"
    DONE = "done"
    BEAT = "beat"
    PULL = "pull"


class Channel:
    """Calls between this process and its peers, named by party (or `server`) and not by cell.

    Args:
        cell: FLARE's, of this process.
        peers: Name -> address.
        job_id: FLARE's name for the job.
    """

    def __init__(self, cell: Any, peers: Mapping[str, str], *, job_id: str) -> None:
        self.job_id = job_id
        # FLARE's streaming layer copies each message; these messages are small or cut into pieces by us.
        self._cell = cell.core_cell
        self._address = dict(peers)
        self._name_of = {address: name for name, address in peers.items()}

    @property
    def peers(self) -> tuple[str, ...]:
        """Names of the peers."""
        return tuple(self._address)

    def serve(self, topic: Topic, answer: Callable[[str, Buffer], Buffer]) -> None:
        """Answer a peer's calls from now on.

        Args:
            topic: What the calls are about.
            answer: (caller, body) -> body. It must not wait for long.
        """
        self._cell.register_request_cb(_CHANNEL, topic.value, self._answer, answer)

    def _answer(self, message: Any, answer: Callable[[str, Buffer], Buffer]) -> Any:
        # The origin is what the caller says it is; who it really was is proved by the message's signature.
        name = self._name_of.get(message.get_header(MessageHeaderKey.ORIGIN))
        if name is None:
            return make_reply(ReturnCode.UNAUTHENTICATED)
        try:
            given = answer(name, message.payload or b"")
            return new_cell_message({MessageHeaderKey.RETURN_CODE: ReturnCode.OK}, given)
        except Exception:  # noqa: BLE001  (no exception text crosses to the other side)
            _log.exception("a call from %s failed", name)
            return make_reply(ReturnCode.PROCESS_EXCEPTION)

    def call(self, peer: str, topic: Topic, body: Buffer, *, timeout_s: float) -> Buffer | None:
        """Return a peer's answer, or None when it is away or does not answer in time.

        Args:
            peer: Its name.
            topic: What the call is about.
            body: What to send.
            timeout_s: How long to wait, in seconds.
        """
        message = new_cell_message({}, body)
        reply = self._cell.send_request(
            _CHANNEL, topic.value, self._address[peer], message, timeout=timeout_s, optional=True
        )
        if reply is None or reply.get_header(MessageHeaderKey.RETURN_CODE) != ReturnCode.OK:
            return None
        payload: Buffer | None = reply.payload
        return payload if payload is not None else b""
