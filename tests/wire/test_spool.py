"""Pulling a blob in pieces: any loss, any cut, any earlier beginning gives the same bytes, and lies are refused."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import PayloadError, ResourceError
from fedllm.wire import spool as spool_module
from fedllm.wire.blob import FileBlob, MemoryBlob, whole
from fedllm.wire.spool import Ask, Spool

MEBI = 2**20


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "_RETRY_S", 0.0)


class Peer:
    """The other side: gives pieces, counts them, and fails as it is told."""

    def __init__(self, data: bytes, *, fails: Callable[[int], bool] = lambda calls: False) -> None:
        self.data, self.given, self.calls, self._fails = data, 0, 0, fails
        self._lock = threading.Lock()

    def __call__(self, offset: int, length: int) -> bytes | None:
        with self._lock:
            self.calls += 1
            if self._fails(self.calls):
                return None
            piece = self.data[offset : offset + length]
            self.given += len(piece)
        return piece


def pulled(
    spool: Spool, data: bytes, ask: Ask, *, sender: str = "north", cancelled: Callable[[], bool] | None = None
) -> FileBlob:
    blob = MemoryBlob(data)
    return spool.pull(blob.digest, blob.size, sender=sender, ask=ask, cancelled=cancelled or (lambda: False))


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@given(
    size=st.integers(1, 3 * MEBI),
    seed=st.integers(0, 2**31),
    loss=st.floats(0, 0.6),
    first=st.integers(1, 2**17),
    most=st.integers(1, 2**19),
)
@settings(max_examples=40)
def test_any_size_of_pieces_and_any_loss_give_the_same_bytes(
    size: int, seed: int, loss: float, first: int, most: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw, data = random.Random(seed), noise(size, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool_module, "_FIRST_PIECE_BYTES", max(first, size // 200))
        patch.setattr(spool_module, "MAX_PIECE_BYTES", max(most, size // 200))
        peer = Peer(data, fails=lambda calls: draw.random() < loss)
        blob = pulled(Spool(tmp_path_factory.mktemp("spool")), data, peer)
    assert (whole(blob), blob.digest, blob.size) == (data, MemoryBlob(data).digest, size)


@given(seed=st.integers(0, 2**31), cuts=st.lists(st.floats(0, 1), max_size=4))
@settings(max_examples=30)
def test_a_process_that_dies_anywhere_goes_on_where_it_was(
    seed: int, cuts: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, data = tmp_path_factory.mktemp("spool"), noise(2 * MEBI, seed)
    peer = Peer(data)
    for cut in cuts:
        until = peer.given + int(cut * len(data) / 2)
        with suppress(PayloadError):
            pulled(Spool(folder), data, peer, cancelled=lambda until=until: peer.given >= until)
    assert whole(pulled(Spool(folder), data, peer)) == data
    # What was on its way at each cut is sent again, and no more.
    assert peer.given <= len(data) + len(cuts) * spool_module._WINDOW * spool_module.MAX_PIECE_BYTES


@pytest.mark.parametrize("dies", [False, True])
def test_after_a_cut_at_60_percent_less_than_45_percent_are_sent_again(dies: bool, tmp_path: Path) -> None:
    data = noise(16 * MEBI)
    cut = threading.Event()

    def fails(calls: int) -> bool:
        if peer.given >= 0.6 * len(data) and not cut.is_set():
            cut.set()
            down.append(calls)
        # Down for the next thirty calls.
        return cut.is_set() and calls < down[0] + 30

    down: list[int] = []
    peer = Peer(data, fails=fails)
    if dies:
        with pytest.raises(PayloadError):
            pulled(Spool(tmp_path), data, peer, cancelled=cut.is_set)
    assert whole(pulled(Spool(tmp_path), data, peer)) == data
    assert cut.is_set()
    assert len(data) <= peer.given <= 1.45 * len(data)


def test_two_senders_of_the_same_bytes_do_not_meet(tmp_path: Path) -> None:
    spool, data = Spool(tmp_path), noise(MEBI)
    blobs = [pulled(spool, data, Peer(data), sender=sender) for sender in ("north", "south")]
    blobs[0].discard()
    assert whole(blobs[1]) == data


@pytest.mark.parametrize("where", [0, 100_000, -1])
def test_other_bytes_than_announced_are_refused_and_leave_nothing(where: int, tmp_path: Path) -> None:
    spool, data = Spool(tmp_path), noise(200_000)
    wrong = bytearray(data)
    wrong[where] ^= 1
    with pytest.raises(PayloadError) as caught:
        pulled(spool, data, Peer(bytes(wrong)))
    assert (caught.value.code, caught.value.where) == ("PAYLOAD_REFUSED", "north")
    assert list(tmp_path.iterdir()) == []
    assert whole(pulled(spool, data, Peer(data))) == data


@pytest.mark.parametrize("damage", ["flipped", "longer", "of another size"])
def test_a_damaged_beginning_is_pulled_anew(damage: str, tmp_path: Path) -> None:
    data, peer = noise(MEBI), Peer(noise(MEBI))
    with pytest.raises(PayloadError):
        pulled(Spool(tmp_path), data, peer, cancelled=lambda: peer.given > len(data) / 2)
    part = next(tmp_path.glob("*.part"))
    held = bytearray(part.read_bytes())
    assert held
    if damage == "flipped":
        held[len(held) // 2] ^= 1
    part.write_bytes(held + noise(2 * MEBI) if damage == "longer" else held if damage == "flipped" else data + b"x")
    assert whole(pulled(Spool(tmp_path), data, peer)) == data


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (lambda offset, length: b"", "BLOB_MISSING"),
        (lambda offset, length: bytes(length + 1), "PAYLOAD_REFUSED"),
        (lambda offset, length: bytes(length - 1), "PAYLOAD_REFUSED"),
    ],
)
def test_pieces_of_another_length_are_refused(ask: Ask, code: str, tmp_path: Path) -> None:
    with pytest.raises(PayloadError) as caught:
        pulled(Spool(tmp_path), noise(200_000), ask)
    assert caught.value.code == code


def test_silence_is_given_up_and_what_came_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "STALL_S", 1.0)
    data = noise(4 * MEBI)
    peer = Peer(data, fails=lambda calls: peer.given > MEBI)
    started = time.monotonic()
    with pytest.raises(PayloadError) as caught:
        pulled(Spool(tmp_path), data, peer)
    assert caught.value.code == "ROUND_TIMEOUT"
    assert 1.0 <= time.monotonic() - started < 60
    assert sum(path.stat().st_size for path in tmp_path.glob("*.part")) >= MEBI / 2


def test_slow_progress_is_not_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "STALL_S", 1.0)
    data = noise(2 * MEBI)
    peer = Peer(data)

    def slow(offset: int, length: int) -> bytes | None:
        time.sleep(0.15)
        return peer(offset, length)

    monkeypatch.setattr(spool_module, "MAX_PIECE_BYTES", 2**16)
    started = time.monotonic()
    assert whole(pulled(Spool(tmp_path), data, slow)) == data
    assert time.monotonic() - started > 1.0


def test_a_trickle_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "STALL_S", 0.3)
    monkeypatch.setattr(spool_module, "_FIRST_PIECE_BYTES", 16)
    monkeypatch.setattr(spool_module, "MAX_PIECE_BYTES", 16)
    data = noise(MEBI)
    peer = Peer(data)

    def trickle(offset: int, length: int) -> bytes | None:
        time.sleep(0.05)
        return peer(offset, length)

    with pytest.raises(PayloadError, match="ROUND_TIMEOUT"):
        pulled(Spool(tmp_path), data, trickle)
    assert peer.given < 10_000


def test_pieces_grow_on_a_fast_line_and_shrink_on_a_slow_one() -> None:
    pace = spool_module._Pace()
    for _ in range(10):
        pace.took(0.01)
    assert pace.length == spool_module.MAX_PIECE_BYTES
    for _ in range(20):
        pace.took(3.0)
    assert pace.length == spool_module._MIN_PIECE_BYTES
    pace.took(0.5)
    assert pace.length == spool_module._MIN_PIECE_BYTES


def test_a_start_removes_what_is_whole_and_keeps_what_is_half_pulled(tmp_path: Path) -> None:
    Spool(tmp_path)
    (tmp_path / "north-abc.whole").write_bytes(b"x")
    (tmp_path / "north-abc.part").write_bytes(b"x")
    Spool(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["north-abc.part"]


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(ResourceError, match="DISK_FULL"):
        pulled(spool, noise(10), Peer(noise(10)))
