"""Direct lines for tensors between a party's process and the run's process at the server, through its one port.

FLARE carries every byte between the two through its server's own process, in Python, twice. A party that has tensors to
get or to give calls the server's port with a word before the handshake; whoever listens there hands the fresh
connection over to the run's process, which shakes hands itself: TLS 1.3, both with the certificates of the roster.
Where there is no such line, or it breaks, pieces go through FLARE as all other messages do.
"""

from __future__ import annotations

import errno
import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty, Full, LifoQueue
from typing import NamedTuple, Protocol

from cryptography.hazmat.primitives.serialization import Encoding

from fedllm.identity.kit import Kit
from fedllm.runtime.base import SERVER
from fedllm.runtime.flare.door import door_of, exactly, preamble
from fedllm.runtime.flare.transport import client_context, reason_of, server_context, tune
from fedllm.wire.blob import Blob, Buffer
from fedllm.wire.spool import MAX_PIECE_BYTES

_log = logging.getLogger("fedllm.lines")
# What is asked for: the digest of a blob, where the piece begins, how long it is.
WISH = struct.Struct("<32sQI")
_LENGTH = struct.Struct("<I")
_ASKS, _GIVES = b"a", b"g"
# So many lines each way for a party; a stranger's handshakes wait for one another.
_LINES = 4
_HANDSHAKES = 32
_HANDSHAKE_S = 10.0
_ANSWER_S = 15.0
_RETRY_S = 2.0
# Where no line could be opened, it is not tried again for so long.
_AWAY_S = 30.0

# A piece is read and sent in parts that stay in the processor's cache.
_PART_BYTES = 2**18


class Piece(NamedTuple):
    """A piece of a blob."""

    blob: Blob
    offset: int
    length: int


# (peer, wish) -> the piece, or None if that peer is not to have it.
Find = Callable[[str, Buffer], Piece | None]


class Lines(Protocol):
    """Lines to some peers."""

    def serve(self, find: Find) -> None:
        """Give peers that ask over a line what `find(peer, wish)` returns."""
        ...

    def ask(self, peer: str, wish: bytes) -> Buffer | None:
        """Return a peer's answer to a wish, or None where there is no line to it now."""
        ...

    def need(self) -> None:
        """Have lines ready on which this end will be asked."""
        ...

    def close(self) -> None:
        """Close all lines."""
        ...


# In the process of a run at the server.


class ServerLines:
    """The server's ends. See `Lines`.

    Args:
        kit: The server's.
        job_id: FLARE's name for the job.
        parties: Who takes part.
    """

    def __init__(self, kit: Kit, job_id: str, parties: tuple[str, ...]) -> None:
        self._known = {party: _der(kit, party) for party in parties}
        self._context = server_context(
            {"ca_cert": str(kit.ca), "server_cert": str(kit.cert), "server_key": str(kit.key)}
        )
        self._idle: dict[str, LifoQueue[ssl.SSLSocket]] = {party: LifoQueue(_LINES) for party in parties}
        self._find: Find = lambda peer, wish: None
        self._asking = {party: threading.BoundedSemaphore(_LINES) for party in parties}
        self._room = threading.BoundedSemaphore(_HANDSHAKES)
        self._door = socket.socket(socket.AF_UNIX)
        self._path = door_of(job_id)
        self._ended = threading.Event()

    def serve(self, find: Find) -> None:
        """Take connections from now on.

        Args:
            find: See `Find`.
        """
        self._find = find
        try:
            self._path.unlink(missing_ok=True)
            self._door.bind(str(self._path))
        except OSError as error:
            # Such as a folder for temporary files whose path is too long for a socket.
            _log.warning("no lines for tensors, they go through FLARE: %s", error)
            return
        self._door.listen(_HANDSHAKES)
        threading.Thread(target=self._wait, daemon=True, name="door").start()

    def ask(self, peer: str, wish: bytes) -> Buffer | None:
        """Return a party's answer to a wish, or None where no line to it is free.

        Args:
            peer: The party.
            wish: What is asked for.
        """
        try:
            line = self._idle[peer].get_nowait()
        except Empty:
            return None
        answer = _asked(line, wish, self._idle[peer])
        self._drain_if_ended(self._idle[peer])
        return answer

    def need(self) -> None:
        """Nothing to do: the parties call."""

    def close(self) -> None:
        """Close all lines."""
        self._ended.set()
        self._door.close()
        self._path.unlink(missing_ok=True)
        for idle in self._idle.values():
            _drain(idle)

    def _drain_if_ended(self, idle: LifoQueue[ssl.SSLSocket]) -> None:
        # What was put there after `close` looked would stay open.
        if self._ended.is_set():
            _drain(idle)

    def _wait(self) -> None:
        while True:
            try:
                caller, _ = self._door.accept()
            except OSError:
                return
            with caller, suppress(OSError):
                _, handles, _, _ = socket.recv_fds(caller, 1, 1)
                for handle in handles:
                    self._let_in(socket.socket(fileno=handle))

    def _let_in(self, sock: socket.socket) -> None:
        if self._room.acquire(blocking=False):
            threading.Thread(target=self._welcome, args=(sock,), daemon=True, name="line").start()
        else:
            sock.close()

    def _welcome(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(_HANDSHAKE_S)
            sock = line = self._context.wrap_socket(sock, server_side=True)
            tune(line)
            party, kind = _known_as(line, self._known), exactly(line, 1)
        except (OSError, ValueError) as error:
            _log.warning("a line was refused: %s", reason_of(error))
            sock.close()
            return
        finally:
            self._room.release()
        if kind == _GIVES:
            _put(line, self._idle[party])
            self._drain_if_ended(self._idle[party])
        elif self._asking[party].acquire(blocking=False):
            try:
                _answer_all(line, lambda wish: self._find(party, wish))
            finally:
                self._asking[party].release()
        else:
            line.close()


# In a party's process.


class PartyLines:
    """A party's ends. See `Lines`.

    Args:
        kit: The party's.
        job_id: FLARE's name for the job.
    """

    def __init__(self, kit: Kit, job_id: str) -> None:
        self._address, self._known = (kit.host, kit.port), {SERVER: _der(kit, SERVER)}
        self._context = client_context(
            {"ca_cert": str(kit.ca), "client_cert": str(kit.cert), "client_key": str(kit.key)}
        )
        self._preamble = preamble(job_id)
        self._idle: LifoQueue[ssl.SSLSocket] = LifoQueue(_LINES)
        self._find: Find = lambda peer, wish: None
        self._answering: set[ssl.SSLSocket] = set()
        self._has_lines = False
        self._away_until = 0.0
        self._ended = threading.Event()

    def serve(self, find: Find) -> None:
        """Say what to give over lines; `need` opens them.

        Args:
            find: See `Find`.
        """
        self._find = find

    def ask(self, peer: str, wish: bytes) -> Buffer | None:
        """Return the server's answer to a wish, or None where no line could be opened.

        Args:
            peer: The server.
            wish: What is asked for.
        """
        try:
            line = self._idle.get_nowait()
        except Empty:
            if time.monotonic() < self._away_until:
                return None
            try:
                line = self._called(_ASKS)
            except (OSError, ValueError) as error:
                self._away_until = time.monotonic() + _AWAY_S
                _log.warning("no line to the server, tensors go through FLARE: %s", reason_of(error))
                return None
        answer = _asked(line, wish, self._idle)
        if self._ended.is_set():
            _drain(self._idle)
        return answer

    def need(self) -> None:
        """Open the lines on which the server asks, and keep them open."""
        if not self._has_lines:
            self._has_lines = True
            for _ in range(_LINES):
                threading.Thread(target=self._be_asked, daemon=True, name="line").start()

    def close(self) -> None:
        """Close all lines."""
        self._ended.set()
        _drain(self._idle)
        for line in list(self._answering):
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def _be_asked(self) -> None:
        while not self._ended.is_set():
            with suppress(OSError, ValueError):
                line = self._called(_GIVES)
                self._answering.add(line)
                _answer_all(line, lambda wish: self._find(SERVER, wish))
                self._answering.discard(line)
            self._ended.wait(_RETRY_S)

    def _called(self, kind: bytes) -> ssl.SSLSocket:
        sock = socket.create_connection(self._address, timeout=_HANDSHAKE_S)
        try:
            sock.sendall(self._preamble)
            sock = line = self._context.wrap_socket(sock, server_hostname=self._address[0])
            tune(line)
            _known_as(line, self._known)
            line.sendall(kind)
        except BaseException:
            sock.close()
            raise
        return line


def _der(kit: Kit, name: str) -> bytes:
    return kit.roster.certificate(name).public_bytes(Encoding.DER)


def _known_as(line: ssl.SSLSocket, known: Mapping[str, bytes]) -> str:
    certificate = line.getpeercert(binary_form=True)
    for name, der in known.items():
        if certificate == der:
            return name
    raise PermissionError(errno.EACCES, "the certificate is not that of anyone who takes part")


def _asked(line: ssl.SSLSocket, wish: bytes, idle: LifoQueue[ssl.SSLSocket]) -> Buffer | None:
    try:
        line.settimeout(_ANSWER_S)
        line.sendall(wish)
        (length,) = _LENGTH.unpack(exactly(line, _LENGTH.size))
        if length > MAX_PIECE_BYTES:
            raise ValueError("a piece too long")
        piece = exactly(line, length)
    except (OSError, ValueError) as error:
        _log.info("a line broke: %s", reason_of(error))
        line.close()
        return None
    _put(line, idle)
    return piece


def _answer_all(line: ssl.SSLSocket, find: Callable[[Buffer], Piece | None]) -> None:
    buffer = memoryview(bytearray(_LENGTH.size + _PART_BYTES))
    with line, suppress(OSError):
        while True:
            # Until it is asked; a connection that died is noticed by keepalive.
            line.settimeout(None)
            wish = exactly(line, WISH.size)
            line.settimeout(_ANSWER_S)
            # No name here: until the next question it would hold the tensors, and with them their memory.
            _send(line, find(wish), buffer)


def _send(line: ssl.SSLSocket, piece: Piece | None, buffer: memoryview) -> None:
    """Send a piece, its length before it; a blob that was withdrawn meanwhile ends the line."""
    start = _LENGTH.size
    buffer[:start] = _LENGTH.pack(piece.length if piece else 0)
    if piece is None or not piece.length:
        line.sendall(buffer[:start])
        return
    for at in range(0, piece.length, _PART_BYTES):
        end = start + min(_PART_BYTES, piece.length - at)
        piece.blob.read_into(piece.offset + at, buffer[start:end])
        line.sendall(buffer[0 if at == 0 else start : end])


def _put(line: ssl.SSLSocket, idle: LifoQueue[ssl.SSLSocket]) -> None:
    try:
        idle.put_nowait(line)
    except Full:
        line.close()


def _drain(idle: LifoQueue[ssl.SSLSocket]) -> None:
    with suppress(Empty):
        while True:
            idle.get_nowait().close()
