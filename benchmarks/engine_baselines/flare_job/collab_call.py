"""A call by FLARE's Collab, from the server's job process to the clients': bytes there, the same bytes back."""

import json
import os
import time
from pathlib import Path

from nvflare.collab import collab


class Hub:
    """Calls all clients at once, again and again, and writes the seconds of each call to a file."""

    def __init__(self, rounds: int, num_bytes: int, results: str) -> None:
        self.rounds = rounds
        self.num_bytes = num_bytes
        self.results = results

    @collab.main
    def run(self) -> None:
        """Measure."""
        seconds = []
        for _ in range(self.rounds):
            body = os.urandom(self.num_bytes)
            started = time.perf_counter()
            replies = collab.clients(timeout=60).answer(body)
            sizes = [len(reply) for _, reply in replies]
            seconds.append(time.perf_counter() - started)
            if replies.failures or sizes != [self.num_bytes] * len(sizes):
                raise RuntimeError("a client did not answer")
        Path(self.results).write_text(json.dumps(seconds))


class Site:
    """Answers calls with the bytes that came."""

    @collab.publish
    def answer(self, body: bytes) -> bytes:
        """Return what came."""
        return body
