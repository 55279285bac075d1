"""Who can connect to the server, whom a party connects to, and what a stranger can stop: real sockets on loopback."""

from __future__ import annotations

import datetime
import gc
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from fedllm.identity.authority import Authority, create_authority
from fedllm.identity.keys import MIN_KEY_BITS, new_key, save_key
from fedllm.identity.requests import make_request

pytest.importorskip("nvflare")
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo, Mode

from fedllm.runtime.flare.door import SOCKETS
from fedllm.runtime.flare.transport import LOCAL_SCHEME, LocalDriver, TlsDriver, client_context

LOOPBACK = "127.0.0.1"
# Against hanging; the strangers' twenty connections would keep it busy for 200 s.
SHORT_S = 30.0
LONG_S = 120.0


@dataclass(frozen=True)
class Holder:
    """Somebody with a key and a certificate, in FLARE's words."""

    ca: Path
    cert: Path
    key: Path

    def params(self, role: str) -> dict[str, Any]:
        return {"ca_cert": str(self.ca), f"{role}_cert": str(self.cert), f"{role}_key": str(self.key)}


class Monitor:
    """FLARE's listener to connections; it notes who came."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def state_change(self, connection: Any) -> None:
        self.names.append(connection.get_conn_properties().get("peer_cn", "?"))


def holder(root: Path, name: str, authority: Authority, *, kind: str = "party", host: str | None = None) -> Holder:
    site = root / name
    site.mkdir()
    save_key(new_key(bits=MIN_KEY_BITS), site / "key.pem")
    request = make_request(site, name)
    cert = site / "cert.pem"
    cert.write_bytes(authority.sign_request(request.read_bytes(), kind=kind, name=name, host=host))  # type: ignore[arg-type]
    ca = site / "ca.pem"
    ca.write_bytes(authority.pem)
    return Holder(ca, cert, site / "key.pem")


def dated(root: Path, name: str, authority: Authority, *, begin: int, end: int) -> Holder:
    """Return a holder whose certificate the authority signed for days from now."""
    made = holder(root, name, authority)
    old = x509.load_pem_x509_certificate(made.cert.read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(old.subject).issuer_name(old.issuer).public_key(old.public_key())
    builder = builder.serial_number(1).not_valid_before(now + datetime.timedelta(days=begin))
    builder = builder.not_valid_after(now + datetime.timedelta(days=end))
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    signed = builder.sign(authority.key, hashes.SHA256())
    from cryptography.hazmat.primitives.serialization import Encoding

    made.cert.write_bytes(signed.public_bytes(Encoding.PEM))
    return made


def self_signed(root: Path, name: str, ca: Path) -> Holder:
    from cryptography.hazmat.primitives.serialization import Encoding

    site = root / name
    site.mkdir()
    key = new_key(bits=MIN_KEY_BITS)
    save_key(key, site / "key.pem")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    (site / "cert.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    return Holder(ca, site / "cert.pem", site / "key.pem")


@dataclass
class Listening:
    """A server that listens, and everybody who may want something of it."""

    port: int
    monitor: Monitor
    root: Path
    authority: Authority
    other: Authority
    server: Holder
    north: Holder


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    root = tmp_path_factory.mktemp("identities")
    authority = create_authority(root / "authority", project="trial", key=new_key(bits=MIN_KEY_BITS))
    other = create_authority(root / "other", project="trial", key=new_key(bits=MIN_KEY_BITS))
    server = holder(root, "server", authority, kind="server", host=LOOPBACK)
    north = holder(root, "north", authority)
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    driver, monitor = TlsDriver(), Monitor()
    driver.register_conn_monitor(monitor)
    connector = ConnectorInfo("test", driver, server.params("server") | address(port), Mode.PASSIVE, 0, 0, False, False)
    thread = threading.Thread(target=driver.listen, args=(connector,), daemon=True)
    thread.start()
    wait_until(lambda: is_listening(port))
    yield Listening(port, monitor, root, authority, other, server, north)
    driver.shutdown()
    thread.join(SHORT_S)


def address(port: int) -> dict[str, Any]:
    return {"host": LOOPBACK, "port": port, "url": f"tcp://{LOOPBACK}:{port}"}


def wait_until(happened: Callable[[], object]) -> None:
    until = time.monotonic() + LONG_S
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def is_let_in(port: int, context: ssl.SSLContext, *, within_s: float = 0.5) -> bool:
    """Return whether the server keeps a connection open: in TLS 1.3 it refuses after the client's own handshake."""
    try:
        with (
            socket.create_connection((LOOPBACK, port), timeout=SHORT_S) as plain,
            context.wrap_socket(plain, server_hostname=LOOPBACK) as sock,
        ):
            sock.settimeout(within_s)
            return sock.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


def test_a_party_of_the_project_is_let_in(listening: Listening) -> None:
    assert is_let_in(listening.port, client_context(listening.north.params("client")))


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ("expired", "certificate has expired"),
        ("not yet valid", "certificate is not yet valid"),
        ("of another authority", "unable to get local issuer|self-signed|signature failure"),
        ("self-signed", "self-signed|self signed"),
        ("nobody", "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        ("TLS 1.2", "UNSUPPORTED_PROTOCOL|unsupported"),
    ],
)
def test_a_stranger_is_refused_and_both_sides_see_why(
    listening: Listening, caplog: pytest.LogCaptureFixture, who: str, reason: str, tmp_path: Path
) -> None:
    context = stranger(listening, who, tmp_path)
    with caplog.at_level(logging.WARNING, "fedllm.transport"):
        assert not is_let_in(listening.port, context, within_s=LONG_S)
        wait_until(lambda: "refused" in caplog.text)
    assert re.search(reason, caplog.text), caplog.text


def stranger(listening: Listening, who: str, root: Path) -> ssl.SSLContext:
    made = {
        "expired": lambda: dated(root, "north", listening.authority, begin=-9, end=-1),
        "not yet valid": lambda: dated(root, "north", listening.authority, begin=1, end=9),
        "of another authority": lambda: holder(root, "north", listening.other),
        "self-signed": lambda: self_signed(root, "north", listening.north.ca),
    }
    if who in made:
        found = made[who]()
        # It trusts the server; whether the server trusts it is what is looked at.
        return client_context(Holder(listening.north.ca, found.cert, found.key).params("client"))
    if who == "nobody":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(listening.north.ca)
        return context
    context = client_context(listening.north.params("client"))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def test_plain_text_is_refused_and_the_log_says_so(listening: Listening, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedllm.transport"):
        with socket.create_connection((LOOPBACK, listening.port), timeout=SHORT_S) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with suppress(ConnectionResetError):
                assert plain.recv(100)[:1] != b"H"
        wait_until(lambda: "refused" in caplog.text)


def test_silent_strangers_keep_nobody_out(listening: Listening) -> None:
    silent = [socket.create_connection((LOOPBACK, listening.port), timeout=SHORT_S) for _ in range(20)]
    try:
        started = time.monotonic()
        assert is_let_in(listening.port, client_context(listening.north.params("client")))
        assert time.monotonic() - started < SHORT_S
    finally:
        for sock in silent:
            sock.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_silent_stranger_keeps_everybody_out_of_flares_own_driver(listening: Listening) -> None:
    from nvflare.fuel.f3.drivers.tcp_driver import TcpDriver

    driver, monitor = TcpDriver(), Monitor()
    driver.register_conn_monitor(monitor)
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    params = listening.server.params("server") | address(port) | {"secure": True, "scheme": "stcp"}
    connector = ConnectorInfo("theirs", driver, params, Mode.PASSIVE, 0, 0, False, False)
    thread = threading.Thread(target=driver.listen, args=(connector,), daemon=True)
    thread.start()
    wait_until(lambda: is_listening(port))
    with socket.create_connection((LOOPBACK, port), timeout=SHORT_S):
        context = client_context(listening.north.params("client"))
        with (
            socket.create_connection((LOOPBACK, port), timeout=1.0) as plain,
            pytest.raises(TimeoutError),
        ):
            context.wrap_socket(plain, server_hostname=LOOPBACK)
    driver.server.shutdown()
    driver.server.server_close()
    thread.join(SHORT_S)
    # It leaves its sockets to the garbage collector, whose warnings belong to this test.
    del driver, connector, thread
    gc.collect()


@pytest.mark.parametrize("who", ["a party of the project", "a server of another authority", "another host's server"])
def test_a_party_does_not_connect_to_a_false_server(listening: Listening, tmp_path: Path, who: str) -> None:
    false = {
        "a party of the project": lambda: listening.north,
        "a server of another authority": lambda: holder(
            tmp_path, "server", listening.other, kind="server", host=LOOPBACK
        ),
        "another host's server": lambda: holder(
            tmp_path, "server", listening.authority, kind="server", host="elsewhere.example"
        ),
    }[who]()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(false.cert, false.key)
    with socket.create_server((LOOPBACK, 0)) as server:
        port = server.getsockname()[1]

        def pose() -> None:
            plain, _ = server.accept()
            try:
                context.wrap_socket(plain, server_side=True).close()
            except OSError:
                plain.close()

        thread = threading.Thread(target=pose, daemon=True)
        thread.start()
        driver = TlsDriver()
        params = listening.north.params("client") | address(port)
        with pytest.raises(ssl.SSLCertVerificationError):
            driver.connect(ConnectorInfo("false", driver, params, Mode.ACTIVE, 0, 0, False, False))
        thread.join(SHORT_S)


def test_the_server_learns_the_name_in_the_certificate(listening: Listening) -> None:
    driver = TlsDriver()
    driver.register_conn_monitor(Monitor())
    params = listening.north.params("client") | address(listening.port)
    connector = ConnectorInfo("north", driver, params, Mode.ACTIVE, 0, 0, False, False)
    thread = threading.Thread(target=driver.connect, args=(connector,), daemon=True)
    thread.start()
    wait_until(lambda: "north" in listening.monitor.names)
    # It may be about to serve the connection that the server sees already.
    driver.shutdown()
    thread.join(SHORT_S)
    assert not thread.is_alive()


def reached(path: Path) -> socket.socket:
    """A connection to the socket at `path`, tried until somebody listens: its file is there a moment before."""
    until = time.monotonic() + LONG_S
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
        except OSError:
            sock.close()
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return sock


def test_processes_of_a_machine_meet_in_their_supervisors_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("s")
    monkeypatch.setenv(SOCKETS, str(folder))
    url, same = LocalDriver.get_urls(LOCAL_SCHEME, {})
    path = Path(urlparse(url).path)
    assert url == same
    assert path.parent == folder
    driver, monitor = LocalDriver(), Monitor()
    driver.register_conn_monitor(monitor)
    connector = ConnectorInfo("local", driver, {"url": url}, Mode.PASSIVE, 0, 0, False, False)
    thread = threading.Thread(target=driver.listen, args=(connector,), daemon=True)
    thread.start()
    with reached(path):
        wait_until(lambda: monitor.names)
    driver.shutdown()
    thread.join(SHORT_S)
    assert not os.path.lexists(path)
