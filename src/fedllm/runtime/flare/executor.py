"""A party's half in FLARE's job process at its site: one base model, loaded once; requests in, answers out."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedllm.runtime.flare.channel import Channel
from fedllm.runtime.flare.desk import Desk
from fedllm.runtime.supervise import end_with_parent


class PartyExecutor(Executor):
    """FLARE starts it in the job's process at a site. The job is data: it is checked here before anything is done."""

    def __init__(self, job: str, run_id: str) -> None:
        super().__init__()
        self._job: dict[str, Any] = json.loads(job)
        self._run_id = run_id
        self._desk: Desk | None = None

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
        elif event_type in (EventType.END_RUN, EventType.ABORT_TASK) and self._desk:
            self._desk.close()

    def _begin(self, fl_ctx: FLContext) -> None:
        site = Path(fl_ctx.get_workspace().get_root_dir()).parent.parent
        job_id = fl_ctx.get_job_id()
        channel = Channel(fl_ctx.get_engine().get_cell(), {"server": f"server.{job_id}"}, job_id=job_id)
        self._desk = Desk(channel)
        end_with_parent()
        threading.Thread(target=self._serve, args=(site, self._desk), daemon=True).start()

    def _serve(self, site: Path, desk: Desk) -> None:
        from fedllm.runtime.flare.party import open_party

        desk.serve(lambda: open_party(site, self._job, self._run_id, desk))
