"""How bytes travel under FLARE's cells: mutual TLS 1.3 between machines, sockets of one user within a machine.

FLARE's own TCP driver shakes hands while it accepts, so that one silent stranger keeps everybody out; its clients also
trust the machine's public authorities and do not check the server's name; its processes of one machine talk over a
port that every user of that machine can open. These drivers do the same work without that.
"""

from __future__ import annotations

import logging
import secrets
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingMixIn, ThreadingTCPServer, UnixStreamServer
from typing import Any
from urllib.parse import urlparse

from nvflare.fuel.f3.drivers.base_driver import BaseDriver
from nvflare.fuel.f3.drivers.driver import ConnectorInfo
from nvflare.fuel.f3.drivers.driver_params import DriverCap, DriverParams
from nvflare.fuel.f3.drivers.socket_conn import SocketConnection

from fedllm.runtime.flare.door import is_handed_over, sockets_folder

TLS_SCHEME, LOCAL_SCHEME = "tcp", "fedllm-local"
# Room for this many strangers in the midst of a handshake, each for so long.
_BACKLOG = 128
_HANDSHAKE_S = 10.0
_CONNECT_S = 10.0
# A server that is not there is looked for so often, and for so long before FLARE hears of it.
_RETRY_S = 0.3
_PATIENCE_S = 30.0
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
_BUFFER_BYTES = 2**20
_log = logging.getLogger("fedllm.transport")


def server_context(params: dict[str, Any]) -> ssl.SSLContext:
    """Return the server's side: it asks for a certificate of the project's authority, and takes no other.

    Args:
        params: FLARE's parameters of the connector.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(params[DriverParams.CA_CERT.value])
    context.load_cert_chain(params[DriverParams.SERVER_CERT.value], params[DriverParams.SERVER_KEY.value])
    return context


def client_context(params: dict[str, Any]) -> ssl.SSLContext:
    """Return a party's side: it trusts the project's authority alone, and checks the server's name.

    Args:
        params: FLARE's parameters of the connector.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(params[DriverParams.CA_CERT.value])
    context.load_cert_chain(params[DriverParams.CLIENT_CERT.value], params[DriverParams.CLIENT_KEY.value])
    return context


class _Handler(BaseRequestHandler):
    """Serves one connection in a thread of its own."""

    server: _TlsServer | _LocalServer

    def handle(self) -> None:
        server = self.server
        sock = server.secured(self.request, self.client_address)
        if sock is None:
            return
        _serve(server.driver, sock, server.connector, is_secure=server.is_secure)


class _TlsServer(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = _BACKLOG
    is_secure = True

    def __init__(self, driver: _Driver, connector: ConnectorInfo) -> None:
        self.driver, self.connector = driver, connector
        self._context = server_context(connector.params)
        address = connector.params[DriverParams.HOST.value], int(connector.params[DriverParams.PORT.value])
        super().__init__(address, _Handler)

    def secured(self, sock: socket.socket, address: Any) -> ssl.SSLSocket | None:
        """Return the connection after its handshake, or None for one that is refused; the log says why."""
        sock.settimeout(_HANDSHAKE_S)
        try:
            if is_handed_over(sock):
                return None
            made = self._context.wrap_socket(sock, server_side=True)
            # In TLS 1.3 a client's certificate may arrive after the handshake as the client sees it; here it is there.
            made.settimeout(None)
            tune(made)
            return made
        except (OSError, ValueError) as error:
            _log.warning("connection from %s refused: %s", address[0], reason_of(error))
            with suppress(OSError):
                sock.close()
            return None


class _LocalServer(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    request_queue_size = _BACKLOG
    is_secure = False

    def __init__(self, driver: _Driver, connector: ConnectorInfo) -> None:
        self.driver, self.connector = driver, connector
        super().__init__(_socket_path(connector.params), _Handler)

    def secured(self, sock: socket.socket, address: Any) -> socket.socket:
        """Return the connection: only this user can open it."""
        return sock


class _Driver(BaseDriver):
    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()
        self._server: _TlsServer | _LocalServer | None = None

    def shutdown(self) -> None:
        """End all connections, those that are only being made too."""
        self.ended.set()
        self.close_all()
        if self._server:
            self._server.shutdown()
            self._server.server_close()


class TlsDriver(_Driver):
    """Mutual TLS 1.3 with the project's authority."""

    @staticmethod
    def supported_transports() -> list[str]:
        """Return the schemes of the address: these are FLARE's own, see `drivers`."""
        return [TLS_SCHEME, "stcp"]

    @staticmethod
    def capabilities() -> dict[str, Any]:
        """Return what FLARE may expect."""
        return {DriverCap.SEND_HEARTBEAT.value: True, DriverCap.SUPPORT_SSL.value: True}

    def listen(self, connector: ConnectorInfo) -> None:
        """Serve connections until `shutdown`.

        Args:
            connector: Where to listen, with which certificate.
        """
        self.connector = connector
        self._server = _TlsServer(self, connector)
        self._server.serve_forever()

    def connect(self, connector: ConnectorInfo) -> None:
        """Connect, as soon as the server is there, and serve the connection until it ends.

        Args:
            connector: Where to, with which certificate.

        Raises:
            OSError: The server is there and the two do not trust each other, or it stays away.
        """
        self.connector = connector
        sock = self._connected(connector.params)
        _serve(self, sock, connector, is_secure=True)

    def _connected(self, params: dict[str, Any]) -> socket.socket:
        host, port = params[DriverParams.HOST.value], int(params[DriverParams.PORT.value])
        until = time.monotonic() + _PATIENCE_S
        said = ""
        while True:
            try:
                plain = socket.create_connection((host, port), timeout=_CONNECT_S)
                sock: socket.socket = client_context(params).wrap_socket(plain, server_hostname=host)
                sock.settimeout(None)
                tune(sock)
                return sock
            except (OSError, ValueError) as error:
                if (reason := reason_of(error)) != said:
                    said = reason
                    _log.warning("no connection to %s:%s: %s", host, port, reason)
                # FLARE waits ever longer between two tries, which a server that was away for a moment need not cost.
                is_away = isinstance(error, ConnectionRefusedError) and not self.ended.is_set()
                if not is_away or time.monotonic() > until:
                    raise
            self.ended.wait(_RETRY_S)

    @staticmethod
    def get_urls(scheme: str, resources: dict[str, Any]) -> tuple[str, str]:
        """Refuse to choose an address: this driver is for the one that the project names."""
        raise ValueError("the address between machines is the project's")


class LocalDriver(_Driver):
    """Sockets of this machine in a folder that only this user can enter."""

    @staticmethod
    def supported_transports() -> list[str]:
        """Return the scheme of the address."""
        return [LOCAL_SCHEME]

    @staticmethod
    def capabilities() -> dict[str, Any]:
        """Return what FLARE may expect."""
        return {DriverCap.SEND_HEARTBEAT.value: True, DriverCap.SUPPORT_SSL.value: False}

    def listen(self, connector: ConnectorInfo) -> None:
        """Serve connections until `shutdown`.

        Args:
            connector: Where to listen.
        """
        self.connector = connector
        self._server = _LocalServer(self, connector)
        self._server.serve_forever()

    def connect(self, connector: ConnectorInfo) -> None:
        """Connect and serve the connection until it ends.

        Args:
            connector: Where to.
        """
        self.connector = connector
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(_socket_path(connector.params))
        _serve(self, sock, connector, is_secure=False)

    def shutdown(self) -> None:
        """End all connections and remove the socket."""
        super().shutdown()
        if self._server:
            Path(str(self._server.server_address)).unlink(missing_ok=True)

    @staticmethod
    def get_urls(scheme: str, resources: dict[str, Any]) -> tuple[str, str]:
        """Return the address to connect to and the one to listen at: a new one, which nobody can guess or enter.

        Args:
            scheme: This driver's.
            resources: Unused.
        """
        url = f"{scheme}://local{sockets_folder()}/{secrets.token_hex(4)}"
        return url, url


def _serve(driver: _Driver, sock: socket.socket, connector: ConnectorInfo, *, is_secure: bool) -> None:
    with sock:
        connection = SocketConnection(sock, connector, is_secure)
        driver.add_connection(connection)
        if driver.ended.is_set():
            # It was shut down while this connection was made, and could not close it.
            connection.close()
        connection.read_loop()
        driver.close_connection(connection)


def _socket_path(params: dict[str, Any]) -> str:
    return urlparse(str(params[DriverParams.URL.value])).path


def tune(sock: socket.socket) -> None:
    """Have a connection send at once, and notice within half a minute that its other end is gone.

    Args:
        sock: The connection.
    """
    # TLS writes 16 kB at a time. Each would wait until the other side has acknowledged the one before.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in _KEEPALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def reason_of(error: Exception) -> str:
    """Return why a connection failed, in words for the log of this side.

    Args:
        error: What was raised.
    """
    text = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    detail = getattr(error, "verify_message", "")
    return f"{text}{f' ({detail})' if detail else ''}"
