"""The messages by which a package goes from its owner to the parties that lack it, before the handshake.

1. `OfferPackage`: the owner states what the package is, and signs it.
2. `WantPackage`: each other party says whether it needs it, from which piece on, and shows a key.
3. `SealPackage`: the owner seals the key of the pieces for each of those.
4. `TakeKey`, then per piece `GivePiece` of the owner and `TakePiece` of those who need it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedllm.models.package_files import PackageFile
from fedllm.wire.payload import Payload, TensorMap

_Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128,2048}$")]
_Box = Annotated[str, Field(pattern=r"^[0-9a-f]{16,2048}$")]
# The name of the one tensor in which a sealed piece travels.
PIECE = "piece"


class Statement(BaseModel):
    """What the owner says of its package, for one run. `config` is the text of its config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run_id: str
    job_digest: _Hex32
    base_digest: _Hex32
    files: list[PackageFile]
    config: str


class OfferPackage(Payload):
    """Server -> owner: what is the package?"""


class PackageOffered(Payload):
    """Owner -> server: a `Statement` as JSON, and the owner's signature of it."""

    statement: str = Field(max_length=2**22)
    signature: _Signature


class WantPackage(Payload):
    """Server -> each other party: this is the package; do you have it?"""

    statement: str = Field(max_length=2**22)
    signature: _Signature


class ShownKey(BaseModel):
    """A key for which the party wants the package sealed, X25519, signed by the party."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    public: _Hex32
    signature: _Signature


class PackageWanted(Payload):
    """Party -> server: from which piece on it needs the package, and its key; no key: it has it."""

    start: int = Field(ge=0)
    key: ShownKey | None


class SealPackage(Payload):
    """Server -> owner: these parties need it."""

    keys: dict[str, ShownKey]


class PackageSealed(Payload):
    """Owner -> server: the key of the pieces, sealed for each of them."""

    boxes: dict[str, _Box]


class TakeKey(Payload):
    """Server -> a party: what the owner sealed for it."""

    box: _Box


class GivePiece(Payload):
    """Server -> owner: send this piece."""

    number: int = Field(ge=0)


class Piece(Payload):
    """Owner -> server: the piece, sealed."""

    number: int = Field(ge=0)
    data: TensorMap


class TakePiece(Payload):
    """Server -> parties: the piece, as it came. After the last one the party checks the whole and settles it."""

    number: int = Field(ge=0)
    data: TensorMap


class PieceTaken(Payload):
    """Party -> server: the piece is written; after the last one: the package is in its place."""


PACKAGE_REQUESTS: tuple[type[Payload], ...] = (OfferPackage, WantPackage, SealPackage, TakeKey, GivePiece, TakePiece)
PACKAGE_REPLIES: tuple[type[Payload], ...] = (PackageOffered, PackageWanted, PackageSealed, Piece, PieceTaken)
PACKAGE_KINDS = {cls.__name__: cls for cls in (*PACKAGE_REQUESTS, *PACKAGE_REPLIES)}


def text_of_statement(statement: str) -> bytes:
    """Return what the owner signs. Its first word tells it from whatever else a party signs.

    Args:
        statement: A `Statement` as JSON.
    """
    return _text("package", statement)


def text_of_key(statement: str, party: str, public: str) -> bytes:
    """Return what a party signs of the key that it shows.

    Args:
        statement: The owner's, to which it answers.
        party: The party.
        public: Its key.
    """
    return _text("package key", _digest(statement), party, public)


def context_of(statement: str, party: str = "") -> bytes:
    """Return what something is sealed for: the pieces of one offer, or one party's key to them.

    Args:
        statement: The owner's.
        party: Whose key; empty: the pieces.
    """
    return _text("package box", _digest(statement), party)


def _digest(statement: str) -> str:
    return hashlib.sha256(statement.encode()).hexdigest()


def _text(*words: str) -> bytes:
    return json.dumps(words, ensure_ascii=False, separators=(",", ":")).encode()
