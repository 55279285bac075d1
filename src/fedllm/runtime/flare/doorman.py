"""Tells the site, inside FLARE's client process, whether the server can be reached, and since when."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext

from fedllm.errors import FedllmError
from fedllm.runs.folder import now
from fedllm.runs.jsonl import write_json

_LOOK_S = 1.0
_log = logging.getLogger("fedllm.doorman")


class Doorman(FLComponent):
    """One per site. FLARE makes it when it starts; it works in a thread of its own.

    Args:
        site: The site's folder.
    """

    def __init__(self, site: str) -> None:
        super().__init__()
        self._file = Path(site) / "state" / "door.json"

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin when FLARE's client has registered.

        Args:
            event_type: What happens.
            fl_ctx: FLARE's context.
        """
        if event_type == EventType.SYSTEM_START:
            threading.Thread(target=self._work, args=(fl_ctx.get_engine(),), daemon=True, name="doorman").start()

    def _work(self, engine: Any) -> None:
        connected, since = None, now()
        while True:
            found = bool(engine.get_cell().core_cell.is_cell_connected("server"))
            if found != connected:
                connected, since = found, now()
                try:
                    write_json(self._file, {"connected": connected, "since": since})
                except FedllmError as error:
                    _log.error("%s", error)
            time.sleep(_LOOK_S)
