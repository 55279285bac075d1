"""A call by FLARE's Cell, from the server's job process to the clients': bytes there, the same bytes back."""

import json
import os
import time
from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message

CHANNEL = "benchmark"
TOPIC = "call"
READY_S = 60.0


class Caller(Controller):
    """Calls all clients at once, again and again, and writes the seconds of each call to a file."""

    def __init__(self, rounds: int, num_bytes: int, results: str) -> None:
        super().__init__()
        self.rounds = rounds
        self.num_bytes = num_bytes
        self.results = results

    def start_controller(self, fl_ctx) -> None:
        """Nothing to prepare."""

    def stop_controller(self, fl_ctx) -> None:
        """Nothing to put away."""

    def control_flow(self, abort_signal, fl_ctx) -> None:
        """Call until every client answers, then measure."""
        engine = fl_ctx.get_engine()
        targets = [FQCN.join([client.name, fl_ctx.get_job_id()]) for client in engine.get_clients()]
        deadline = time.monotonic() + READY_S
        while not self._call(engine.get_cell(), targets, b"ready?") and time.monotonic() < deadline:
            time.sleep(0.5)
        seconds = []
        for _ in range(self.rounds):
            body = os.urandom(self.num_bytes)
            started = time.perf_counter()
            answered = self._call(engine.get_cell(), targets, body)
            seconds.append(time.perf_counter() - started)
            if not answered or abort_signal.triggered:
                self.system_panic("a client did not answer", fl_ctx)
                return
        Path(self.results).write_text(json.dumps(seconds))

    def _call(self, cell, targets: list[str], body: bytes) -> bool:
        request = new_cell_message({}, body)
        replies = cell.broadcast_request(channel=CHANNEL, topic=TOPIC, targets=targets, request=request, timeout=20.0)
        return all(
            reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK and len(reply.payload) == len(body)
            for reply in replies.values()
        )


class Answerer(Executor):
    """Answers calls with the bytes that came."""

    def handle_event(self, event_type: str, fl_ctx) -> None:
        """Register for the calls when the job starts."""
        if event_type == EventType.START_RUN:
            cell = fl_ctx.get_engine().get_cell()
            cell.register_request_cb(channel=CHANNEL, topic=TOPIC, cb=self._answer)

    def _answer(self, request):
        return make_reply(ReturnCode.OK, body=request.payload)

    def execute(self, task_name: str, shareable, fl_ctx, abort_signal) -> Shareable:
        """Return nothing; no tasks are given."""
        return Shareable()
