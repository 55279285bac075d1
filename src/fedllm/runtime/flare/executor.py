"""A party's half in FLARE's job process at its site: one base model, loaded once; requests in, answers out."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from queue import Queue
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedllm.runtime.flare.channel import Channel, Topic
from fedllm.runtime.flare.link import BEAT_S, HEAD
from fedllm.runtime.supervise import end_with_parent
from fedllm.wire.frame import join, split

_log = logging.getLogger("fedllm.party")
_CALL_S = 30.0


class PartyExecutor(Executor):
    """FLARE starts it in the job's process at a site. The job is data: it is checked here before anything is done."""

    def __init__(self, job: dict[str, Any], run_id: str) -> None:
        super().__init__()
        self._job, self._run_id = job, run_id
        self._stop = threading.Event()
        self._posts: Queue[bytes] = Queue()
        self._said = {"stage": "starting", "step": 0, "num_steps": 0}

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Refuse FLARE's own tasks: none are used."""
        return make_reply(ReturnCode.TASK_UNKNOWN)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin and end with the job.

        Args:
            event_type: What happens.
            fl_ctx: FLARE's context.
        """
        if event_type == EventType.START_RUN:
            self._begin(fl_ctx)
        elif event_type in (EventType.END_RUN, EventType.ABORT_TASK):
            self._stop.set()

    def _begin(self, fl_ctx: FLContext) -> None:
        site = Path(fl_ctx.get_workspace().get_root_dir()).parent.parent
        self._channel = Channel(fl_ctx.get_engine().get_cell(), {"server": f"server.{fl_ctx.get_job_id()}"})
        self._channel.serve(Topic.POST, self._on_post)
        end_with_parent()
        threading.Thread(target=self._beat, daemon=True).start()
        threading.Thread(target=self._serve, args=(site,), daemon=True).start()

    def _on_post(self, _: str, body: bytes) -> bytes:
        self._posts.put(bytes(body))
        return b""

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._channel.call("server", Topic.BEAT, json.dumps(self._said).encode(), timeout_s=BEAT_S)

    def _say(self, stage: str, step: int = 0, num_steps: int = 0) -> None:
        self._said = {"stage": stage, "step": step, "num_steps": num_steps}

    def _serve(self, site: Path) -> None:
        from fedllm.runtime.flare.party import open_party

        self._say("loading")
        host = open_party(site, self._job, self._run_id, lambda step, of: self._say("training", step, of))
        self._say("ready")
        while not self._stop.is_set():
            body = self._posts.get()
            number, timeout_s = HEAD.unpack_from(body)
            answer = join(host.handle(split(body[HEAD.size :]), timeout_s=timeout_s))
            self._say("answering")
            self._deliver(HEAD.pack(number, 0.0) + answer)
            self._say("ready")

    def _deliver(self, body: bytes) -> None:
        while not self._stop.is_set():
            if self._channel.call("server", Topic.DONE, body, timeout_s=_CALL_S) is not None:
                return
            time.sleep(BEAT_S)
