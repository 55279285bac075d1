"""The link to worker processes on this machine: parties are shared out, each process holds one base model."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path

from fedllm.errors import FedllmError, RunFailed, RunPaused
from fedllm.job.job import LocatedParty
from fedllm.runs.folder import RunFolder
from fedllm.runtime.base import Link, Wanted
from fedllm.wire.blob import MemoryBlob, whole
from fedllm.wire.frame import Parcel

_READY_TIMEOUT_S = 300.0
_GRACE_S = 5.0


class WorkerLink(Link):
    """Sends each message to the process of its party. See `fedllm.runtime.base.Link`.

    Bytes go over a socket pair, never pickled. A worker ends by itself when this process does.
    """

    def __init__(self, parties: list[LocatedParty], run: RunFolder, *, num_workers: int) -> None:
        names = [located.party.name for located in parties]
        self._names = tuple(names)
        self._workers: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._of: dict[str, Connection] = {}
        try:
            for index in range(min(num_workers, len(names))):
                share = names[index::num_workers]
                connection = self._start(run, share)
                self._of |= dict.fromkeys(share, connection)
            for _, connection in self._workers:
                self._await_ready(connection)
        except BaseException:
            self.close()
            raise

    @property
    def parties(self) -> tuple[str, ...]:
        """The parties, in the job's order."""
        return self._names

    def exchange(
        self, messages: Mapping[str, Parcel], *, timeout_s: float, wanted: Wanted
    ) -> Iterator[tuple[str, Parcel | None]]:
        """Yield each party's answer as it arrives; a worker serves its parties one after another.

        Args:
            messages: One message per party.
            timeout_s: How long a party may work on its message.
            wanted: Not asked: tensors come along.
        """
        queues: dict[Connection, deque[str]] = {}
        for party in messages:
            queues.setdefault(self._of[party], deque()).append(party)
        due = {connection: self._send(connection, queue, messages, timeout_s) for connection, queue in queues.items()}
        while due:
            ready = wait(list(due), timeout=max(0.0, min(due.values()) - time.monotonic()))
            if not ready:
                late = [connection for connection, at in due.items() if at <= time.monotonic()]
                raise RunPaused(
                    "ROUND_TIMEOUT",
                    f"no answer from {', '.join(queues[connection][0] for connection in late)}",
                    fix="raise `federation.round_timeout`; then `fedllm resume RUN`",
                )
            for connection in ready:
                assert isinstance(connection, Connection)  # noqa: S101
                answer = self._receive(connection, queues[connection][0])
                party = queues[connection].popleft()
                del due[connection]
                if queues[connection]:
                    due[connection] = self._send(connection, queues[connection], messages, timeout_s)
                yield party, answer

    def close(self) -> None:
        """End the workers: they stop when their socket closes."""
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._workers = []

    def _start(self, run: RunFolder, share: list[str]) -> Connection:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "fedllm.runtime.workers", str(theirs.fileno()), str(os.getpid())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)  # noqa: S603
        theirs.close()
        connection = Connection(ours.detach())
        self._workers.append((process, connection))
        identity = {"run_id": run.run_id, "job_digest": run.job_digest}
        order = {"run": str(run.path.resolve()), "parties": share, **identity}
        connection.send_bytes(json.dumps(order).encode())
        return connection

    def _await_ready(self, connection: Connection) -> None:
        if not connection.poll(_READY_TIMEOUT_S):
            raise RunFailed("PARTY_FAILED", "a worker process did not get ready", fix="use fewer workers")
        try:
            answer = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            raise _gone("worker") from None
        if answer["code"]:
            raise RunFailed(answer["code"], answer["what"], where=answer["where"], fix=answer["fix"])

    def _send(
        self, connection: Connection, queue: deque[str], messages: Mapping[str, Parcel], timeout_s: float
    ) -> float:
        head = json.dumps({"party": queue[0], "timeout_s": timeout_s}).encode()
        try:
            connection.send_bytes(head)
            _send(connection, messages[queue[0]])
        except OSError:
            raise _gone(queue[0]) from None
        # The party gives up by itself at timeout_s; the grace lets its answer arrive.
        return time.monotonic() + timeout_s + _GRACE_S

    def _receive(self, connection: Connection, party: str) -> Parcel:
        try:
            return _receive(connection)
        except (EOFError, OSError):
            raise _gone(party) from None


def _send(connection: Connection, parcel: Parcel) -> None:
    connection.send_bytes(parcel.head)
    connection.send_bytes(whole(parcel.blob) if parcel.blob else b"")


def _receive(connection: Connection) -> Parcel:
    head, data = connection.recv_bytes(), connection.recv_bytes()
    return Parcel(head, MemoryBlob(data) if data else None)


def _gone(party: str) -> RunPaused:
    return RunPaused(
        "PARTY_FAILED",
        "its worker process ended",
        where=f"party {party}",
        fix="look for a lack of memory; then `fedllm resume RUN`",
    )


def serve(connection: Connection) -> None:
    """Answer messages until the socket closes.

    Args:
        connection: To the process that started this one.
    """
    from fedllm.runs.folder import attach
    from fedllm.runs.plan_files import read_plan
    from fedllm.runtime.local import local_hosts
    from fedllm.runtime.site import open_site, party_tokens

    order = json.loads(connection.recv_bytes())
    try:
        job, parties = read_plan(Path(order["run"]))
        run = attach(Path(order["run"]), run_id=order["run_id"], job_digest=order["job_digest"])
        mine = [located for located in parties if located.party.name in order["parties"]]
        site = open_site(job, mine)
        hosts = local_hosts(site, {located.party.name: party_tokens(site, located) for located in mine}, run)
    except FedllmError as error:
        note = {"code": error.code, "what": error.what, "where": error.where, "fix": error.fix}
        connection.send_bytes(json.dumps(note).encode())
        return
    connection.send_bytes(json.dumps({"code": ""}).encode())
    while True:
        head = json.loads(connection.recv_bytes())
        _send(connection, hosts[head["party"]].handle(_receive(connection), timeout_s=head["timeout_s"]))


def _end_with(parent: int) -> None:
    # A worker in the midst of its training does not look at the socket, and nobody waits for its answer any more.
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def main() -> None:
    """Run a worker; its arguments are the number of an inherited socket and the id of the process that started it."""
    from contextlib import suppress
    from threading import Thread

    Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
