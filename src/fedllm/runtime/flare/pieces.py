"""Tensors between machines go in pieces: whoever needs them asks for one after another, by digest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fedllm.runtime.flare.channel import Channel, Topic
from fedllm.runtime.flare.lines import WISH, Lines, Piece
from fedllm.wire.blob import Blob, Buffer, read
from fedllm.wire.spool import MAX_PIECE_BYTES, Ask

_CALL_S = 15.0


class Offers:
    """The blobs that others may pull from this process, each by whom.

    Args:
        channel: To those who pull.
        on_piece: Called with the name of whoever was given a piece.
    """

    def __init__(self, channel: Channel, *, on_piece: Callable[[str], None] = lambda peer: None) -> None:
        self._offered: dict[bytes, tuple[Blob, set[str]]] = {}
        self._lock = threading.Lock()
        self._on_piece = on_piece
        channel.serve(Topic.PULL, self._give)

    def offer(self, blob: Blob, to: str) -> None:
        """Let one more pull a blob.

        Args:
            blob: The blob.
            to: Its name.
        """
        with self._lock:
            self._offered.setdefault(bytes.fromhex(blob.digest), (blob, set()))[1].add(to)

    def withdraw(self, blobs: Iterable[Blob]) -> None:
        """Let nobody pull these blobs any more.

        Args:
            blobs: The blobs.
        """
        with self._lock:
            for blob in blobs:
                self._offered.pop(bytes.fromhex(blob.digest), None)

    def find(self, peer: str, wish: Buffer) -> Piece | None:
        """Return the piece that a peer wishes for, or None if it is not to have it.

        Args:
            peer: Its name.
            wish: Digest, offset and length.
        """
        if len(wish) != WISH.size:
            return None
        digest, offset, length = WISH.unpack(wish)
        with self._lock:
            blob, to = self._offered.get(digest, (None, set()))
        if blob is None or peer not in to or length > MAX_PIECE_BYTES or offset + length > blob.size:
            return None
        self._on_piece(peer)
        return Piece(blob, offset, length)

    def _give(self, peer: str, wish: Buffer) -> Buffer:
        piece = self.find(peer, wish)
        try:
            return read(piece.blob, piece.offset, piece.length) if piece else b""
        except OSError:
            # It was withdrawn meanwhile.
            return b""


@dataclass(frozen=True)
class Way:
    """To a peer: by a direct line, and where there is none through FLARE's cells."""

    channel: Channel
    lines: Lines | None = None

    def ask(self, peer: str, wish: bytes) -> Buffer | None:
        """Return a peer's answer to a wish, or None where none came.

        Args:
            peer: Its name.
            wish: What is asked for.
        """
        piece = self.lines.ask(peer, wish) if self.lines else None
        return piece if piece is not None else self.channel.call(peer, Topic.PULL, wish, timeout_s=_CALL_S)


def asker(way: Way, peer: str, digest: str, *, on_piece: Callable[[str], None] = lambda peer: None) -> Ask:
    """Return what asks a peer for pieces of a blob.

    Args:
        way: To the peer.
        peer: Who offers the blob.
        digest: The blob's SHA-256, in hex.
        on_piece: Called with the peer's name when a piece came.
    """

    def ask(offset: int, length: int) -> Buffer | None:
        wish = WISH.pack(bytes.fromhex(digest), offset, length)
        piece = way.ask(peer, wish)
        if piece:
            on_piece(peer)
        return piece

    return ask
