"""How a connection to the server's one port comes to the process of a run: handed over before the handshake.

The process that listens and those of the runs meet at sockets in a folder of their supervisor, which only its user can
enter.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from pathlib import Path

# Names the folder of this machine's sockets to the processes below a supervisor. It is short, since a path of a socket
# has 108 bytes at most, and goes with the supervisor.
SOCKETS = "FEDLLM_SOCKETS"
# A TLS handshake does not begin with this.
_WORD = b"fedllm line 1 "
_PREAMBLE_BYTES = 64
_JOB = re.compile(r"[0-9a-f-]{8,40}")
# Of a job's name, which is drawn at random: enough to tell jobs apart, and short.
_NAME_LENGTH = 12


def sockets_folder() -> Path:
    """Return the folder of this machine's sockets."""
    return Path(os.environ[SOCKETS])


def door_of(job_id: str) -> Path:
    """Return the socket where the process of a job waits.

    Args:
        job_id: FLARE's name for the job.

    Raises:
        ValueError: That is no such name.
    """
    if not _JOB.fullmatch(job_id):
        raise ValueError("not the name of a job")
    return sockets_folder() / f"run-{job_id.replace('-', '')[:_NAME_LENGTH]}"


def preamble(job_id: str) -> bytes:
    """Return what a caller says before the handshake.

    Args:
        job_id: The job whose process it wants.
    """
    return (_WORD + job_id.encode()).ljust(_PREAMBLE_BYTES)


def is_handed_over(sock: socket.socket) -> bool:
    """Return whether a fresh connection was meant for the process of a run, which has it now; else it is untouched.

    Args:
        sock: The connection, with a timeout.

    Raises:
        OSError: The other side says nothing, or breaks off.
        ValueError: It does not name a job.
    """
    first = bytearray(1)
    sock.recv_into(first, 1, socket.MSG_PEEK)
    if first != _WORD[:1]:
        return False
    said = bytes(exactly(sock, _PREAMBLE_BYTES))
    path = door_of(said.removeprefix(_WORD).rstrip().decode("ascii", "replace"))
    # Where nobody is at the door, the connection just ends.
    with sock, suppress(FileNotFoundError, ConnectionRefusedError), socket.socket(socket.AF_UNIX) as door:
        door.connect(str(path))
        socket.send_fds(door, [b"."], [sock.fileno()])
    return True


def exactly(sock: socket.socket, length: int) -> bytearray:
    """Return so many bytes from a connection.

    Args:
        sock: The connection.
        length: How many.

    Raises:
        OSError: It ended before, or took too long.
    """
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if not count:
            raise ConnectionResetError
        view = view[count:]
    return data
