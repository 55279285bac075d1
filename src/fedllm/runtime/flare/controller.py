"""The server's half in FLARE's job process: drives the run in its folder and writes its verdict."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.signal import Signal

from fedllm.errors import FedllmError
from fedllm.runtime.flare.channel import Channel
from fedllm.runtime.supervise import end_with_parent

_log = logging.getLogger("fedllm.server")


class RunController(Controller):
    """FLARE starts it in the job's process at the server. It names a run; all else is in the run's folder."""

    def __init__(self, run_id: str) -> None:
        super().__init__()
        self._run_id = run_id

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Leave nothing behind that works on the run when FLARE's server is gone."""
        end_with_parent()

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing to end."""

    def process_result_of_unknown_task(self, *_: Any, **__: Any) -> None:
        """No tasks are used."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Drive the run to its end, or until it pauses.

        Args:
            abort_signal: Set by FLARE when the job is stopped.
            fl_ctx: FLARE's context.
        """
        from fedllm.runtime.flare.server import drive_run

        engine = fl_ctx.get_engine()
        job_id = fl_ctx.get_job_id()
        site = Path(fl_ctx.get_workspace().get_root_dir()).parent.parent
        peers = {client.name: f"{client.get_fqcn()}.{job_id}" for client in engine.get_clients()}
        cell = engine.get_cell()

        def make_channel(parties: list[str]) -> Channel:
            return Channel(cell, {party: peers[party] for party in parties if party in peers}, job_id=job_id)

        try:
            drive_run(site, self._run_id, make_channel, aborted=lambda: bool(abort_signal.triggered))
        except FedllmError as error:
            # The verdict is in the run folder.
            _log.error("%s", error)
        except Exception:
            _log.exception("the run failed")
            raise
