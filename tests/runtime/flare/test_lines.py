"""Direct lines for tensors: who may open one, what goes over it, and what happens where there is none."""

from __future__ import annotations

import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from fedllm.identity.files import CoordinatorFolder
from fedllm.identity.kit import Kit, open_kit
from fedllm.job.project import Project
from fedllm.runtime.base import SERVER
from fedllm.runtime.provision import provision_all

pytest.importorskip("nvflare")
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo, Mode

from fedllm.runtime.flare import lines as lines_module
from fedllm.runtime.flare.door import SOCKETS, preamble
from fedllm.runtime.flare.lines import WISH, PartyLines, Piece, ServerLines
from fedllm.runtime.flare.transport import TlsDriver
from fedllm.wire.blob import Buffer, FileBlob, MemoryBlob
from fedllm.wire.spool import MAX_PIECE_BYTES

LOOPBACK = "127.0.0.1"
JOB_ID = "0b0f7c1e-0000-4000-8000-000000000000"
WISH_FOR = WISH.pack(b"d" * 32, 7, 9)
# Against hanging; the strangers' twenty connections would keep it busy for 200 s.
SHORT_S = 30.0
LONG_S = 120.0


@dataclass
class Site:
    """A server that listens for a project of three, two of whom take part in the run."""

    kits: dict[str, Kit]
    lines: ServerLines
    given: list[tuple[str, bytes]] = field(default_factory=list)
    piece: bytes = b"a piece"

    def find(self, peer: str, wish: Buffer) -> Piece:
        self.given.append((peer, bytes(wish)))
        return piece_of(self.piece)

    def party(self, name: str, *, job_id: str = JOB_ID) -> PartyLines:
        return PartyLines(self.kits[name], job_id)


def piece_of(data: bytes) -> Piece:
    """Return a piece from within a blob."""
    return Piece(MemoryBlob(b"before" + data + b"after"), len(b"before"), len(data))


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kit]:
    return provisioned(tmp_path_factory.mktemp("project"))


def provisioned(root: Path) -> dict[str, Kit]:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    parties = ["north", "east", "south"]
    project = Project.model_validate({"name": "trial", "server": {"host": LOOPBACK, "port": port}, "parties": parties})
    folder = CoordinatorFolder(root / "coordinator")
    provision_all(folder.root, project, {name: root / name for name in parties})
    return {SERVER: open_kit(folder.site)} | {name: open_kit(root / name) for name in parties}


@pytest.fixture
def site(
    kits: dict[str, Kit], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    monkeypatch.setenv(SOCKETS, str(tmp_path_factory.mktemp("s")))
    driver, kit = TlsDriver(), kits[SERVER]
    params = {"ca_cert": str(kit.ca), "server_cert": str(kit.cert), "server_key": str(kit.key)}
    where = {"host": LOOPBACK, "port": kit.port, "url": f"tcp://{LOOPBACK}:{kit.port}"}
    connector = ConnectorInfo("test", driver, params | where, Mode.PASSIVE, 0, 0, False, False)
    thread = threading.Thread(target=driver.listen, args=(connector,), daemon=True)
    thread.start()
    made = Site(kits, ServerLines(kit, JOB_ID, ("north", "east")))
    made.lines.serve(made.find)
    wait_until(lambda: is_listening(kit.port))
    yield made
    made.lines.close()
    driver.shutdown()
    thread.join(SHORT_S)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def wait_until(happened: Callable[[], object]) -> None:
    until = time.monotonic() + LONG_S
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_party_asks_the_server_over_a_line_of_its_own(site: Site) -> None:
    north, east = site.party("north"), site.party("east")
    assert north.ask(SERVER, WISH_FOR) == site.piece
    assert east.ask(SERVER, WISH_FOR) == site.piece
    assert north.ask(SERVER, WISH_FOR) == site.piece
    assert site.given == [("north", WISH_FOR), ("east", WISH_FOR), ("north", WISH_FOR)]
    north.close()
    east.close()


def test_the_server_asks_a_party_over_lines_that_the_party_opened(site: Site) -> None:
    north = site.party("north")
    north.serve(lambda peer, wish: piece_of(f"{peer} asked for {len(wish)} bytes of wish".encode()))
    assert site.lines.ask("north", WISH_FOR) is None, "before the party has opened one there is none"
    north.need()
    north.need()
    wait_until(lambda: site.lines.ask("north", WISH_FOR) == b"server asked for 44 bytes of wish")
    assert site.lines.ask("east", WISH_FOR) is None, "each party has its own lines"
    north.close()


@pytest.mark.parametrize("size", [0, 1, lines_module._PART_BYTES, lines_module._PART_BYTES + 1, MAX_PIECE_BYTES])
def test_pieces_of_every_size_come_whole(site: Site, size: int) -> None:
    site.piece = bytes(range(256)) * (size // 256) + bytes(size % 256)
    north = site.party("north")
    assert north.ask(SERVER, WISH_FOR) == site.piece
    north.close()


def test_a_piece_that_is_too_long_is_not_taken(site: Site) -> None:
    site.piece = bytes(MAX_PIECE_BYTES + 1)
    north = site.party("north")
    assert north.ask(SERVER, WISH_FOR) is None
    north.close()


def test_a_piece_that_a_party_is_not_to_have_is_none(site: Site) -> None:
    site.lines._find = lambda peer, wish: None
    north = site.party("north")
    assert north.ask(SERVER, WISH_FOR) == b""
    north.close()


def test_a_blob_that_is_withdrawn_while_it_is_sent_ends_the_line_and_no_more(site: Site, tmp_path: Path) -> None:
    gone = FileBlob(tmp_path / "gone", "d" * 64, 10)
    site.lines._find = lambda peer, wish: Piece(gone, 0, 10)
    north = site.party("north")
    assert north.ask(SERVER, WISH_FOR) is None
    site.lines._find = site.find
    assert north.ask(SERVER, WISH_FOR) == site.piece
    north.close()


def test_many_pieces_at_a_time_go_over_a_few_lines(site: Site) -> None:
    north = site.party("north")
    found: list[Buffer | None] = []
    threads = [threading.Thread(target=lambda: found.append(north.ask(SERVER, WISH_FOR))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SHORT_S)
    # More lines than a party may have are refused; those pieces go another way.
    assert len(found) == 12
    assert found.count(site.piece) >= 4
    assert all(piece in (site.piece, None) for piece in found)
    north.close()


def outsider(site: Site, who: str, root: Path) -> PartyLines:
    if who == "a party of the project that takes no part":
        return site.party("south")
    if who == "a party that names no run":
        return site.party("north", job_id="11111111-0000-4000-8000-000000000000")
    if who == "a party that names a path":
        made = site.party("north")
        made._preamble = preamble("../../x")
        return made
    own = site.kits["north"]
    if who == "a party of another project":
        others = provisioned(root)
        made = PartyLines(replace(others["north"], host=own.host, port=own.port, roster=own.roster), JOB_ID)
        # It trusts this server; whether the server trusts it is what is looked at.
        made._context.load_verify_locations(own.ca)
        return made
    made = PartyLines(own, JOB_ID)
    made._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made._context.load_verify_locations(own.ca)
    if who == "TLS 1.2":
        made._context.maximum_version = ssl.TLSVersion.TLSv1_2
        made._context.load_cert_chain(own.cert, own.key)
    return made


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ("a party of the project that takes no part", "not that of anyone who takes part"),
        ("a party of another project", "verify|signature|issuer|self-signed|CERTIFICATE"),
        ("nobody", "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        ("TLS 1.2", "UNSUPPORTED_PROTOCOL|unsupported"),
        ("a party that names no run", None),
        ("a party that names a path", "ValueError"),
    ],
)
def test_others_get_no_line(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture, who: str, reason: str | None
) -> None:
    with caplog.at_level(logging.WARNING):
        lines = outsider(site, who, tmp_path)
        assert lines.ask(SERVER, WISH_FOR) is None
        if reason is not None:
            wait_until(lambda: re.search(f"refused: .*({reason})", caplog.text))
    assert site.given == []
    lines.close()


def test_a_certificate_of_the_authority_that_is_not_in_the_roster_gets_no_line(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    # The server knows north by another certificate than the one that north shows: that of east.
    site.lines._known["north"] = site.lines._known["east"]
    with caplog.at_level(logging.WARNING):
        north = site.party("north")
        assert north.ask(SERVER, WISH_FOR) is None
        wait_until(lambda: "not that of anyone who takes part" in caplog.text)
    assert site.given == []
    north.close()


def test_it_is_the_list_of_those_who_take_part_that_keeps_another_party_out(site: Site) -> None:
    # With the list's check off, as a longer list makes it, the party that is refused above gets what it asks for.
    site.lines = ServerLines(site.kits[SERVER], JOB_ID, ("north", "east", "south"))
    site.lines.serve(site.find)
    south = site.party("south")
    assert south.ask(SERVER, WISH_FOR) == site.piece
    south.close()


def test_a_party_takes_no_other_server(site: Site) -> None:
    north = site.party("north")
    north._known = {SERVER: b"another certificate"}
    assert north.ask(SERVER, WISH_FOR) is None
    assert site.given == []
    north.close()


def test_strangers_who_know_the_run_and_say_nothing_keep_nobody_out(site: Site) -> None:
    port = site.kits[SERVER].port
    silent = [socket.create_connection((LOOPBACK, port), timeout=SHORT_S) for _ in range(20)]
    for sock in silent:
        sock.sendall(preamble(JOB_ID))
    half = [socket.create_connection((LOOPBACK, port), timeout=SHORT_S) for _ in range(5)]
    for sock in half:
        sock.sendall(preamble(JOB_ID)[:20])
    started = time.monotonic()
    north = site.party("north")
    assert north.ask(SERVER, WISH_FOR) == site.piece
    assert time.monotonic() - started < SHORT_S
    north.close()
    for sock in silent + half:
        sock.close()


def test_a_party_cannot_have_the_server_serve_more_lines_than_its_share(site: Site) -> None:
    north = site.party("north")
    held = [north._called(b"a") for _ in range(lines_module._LINES)]
    for line in held:
        line.sendall(WISH_FOR)
    wait_until(lambda: len(site.given) == len(held))
    more = north._called(b"a")
    more.settimeout(SHORT_S)
    with suppress(OSError):
        assert more.recv(1) == b""
    for line in [*held, more]:
        line.close()
    wait_until(lambda: north.ask(SERVER, WISH_FOR) == site.piece)
    north.close()


def test_a_line_that_breaks_is_replaced(site: Site) -> None:
    north = site.party("north")
    assert north.ask(SERVER, WISH_FOR) == site.piece
    line = north._idle.get_nowait()
    line.shutdown(socket.SHUT_RDWR)
    north._idle.put(line)
    assert north.ask(SERVER, WISH_FOR) is None
    assert north.ask(SERVER, WISH_FOR) == site.piece
    north.close()


def test_where_the_server_is_away_lines_are_not_tried_again_for_a_while(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    north = site.party("north")
    address, north._address = north._address, (LOOPBACK, 1)
    assert north.ask(SERVER, WISH_FOR) is None
    north._address = address
    assert north.ask(SERVER, WISH_FOR) is None, "it waits before it tries again"
    monkeypatch.setattr(north, "_away_until", 0.0)
    assert north.ask(SERVER, WISH_FOR) == site.piece
    north.close()


def test_without_room_for_a_socket_there_are_no_lines_and_no_more(
    kits: dict[str, Kit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    monkeypatch.setenv(SOCKETS, str(deep))
    lines = ServerLines(kits[SERVER], JOB_ID, ("north",))
    with caplog.at_level(logging.WARNING):
        lines.serve(lambda peer, wish: None)
    assert "go through FLARE" in caplog.text
    assert lines.ask("north", WISH_FOR) is None
    lines.close()
