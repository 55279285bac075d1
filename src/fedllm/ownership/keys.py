"""The Ed25519 key with which a party signs its commitments and the log's heads."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedllm.disk import make_private
from fedllm.errors import IdentityError
from fedllm.identity.keys import read_private, save_private

KEY_FILE = "key.pem"
_FIX = "restore the file from a backup; claims that were made with it are signed by no other key"


def open_key(folder: Path) -> Ed25519PrivateKey:
    """Return a party's signing key, made at the first call.

    It is another key than that of the party's certificate: a claim may outlive a project and its certificates.

    Args:
        folder: The party's folder of claims; made if absent, for its owner alone.

    Raises:
        IdentityError: `BAD_KEY` or `KEY_EXPOSED`.
        ResourceError: `DISK_FULL`.
    """
    path = make_private(folder) / KEY_FILE
    if not path.exists():
        save_private(_pem(Ed25519PrivateKey.generate()), path, fix=_FIX)
    data = read_private(path, fix=_FIX)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # The reason that the library gives may quote the file, so it is not passed on.
        raise IdentityError("BAD_KEY", "not a private key in plain PEM form", where=str(path), fix=_FIX) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError("BAD_KEY", "not an Ed25519 key", where=str(path), fix=_FIX)
    return key


def _pem(key: Ed25519PrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def public_hex(key: Ed25519PrivateKey) -> str:
    """Return the public key's 32 bytes, hex.

    Args:
        key: The private key.
    """
    return key.public_key().public_bytes_raw().hex()


def sign(key: Ed25519PrivateKey, text: bytes, *, purpose: str) -> str:
    """Return a signature, hex.

    Args:
        key: The private key.
        text: What is signed.
        purpose: What kind of thing it is; a signature of one kind is none of another.
    """
    return key.sign(_framed(text, purpose)).hex()


def is_signed(public: str, text: bytes, signature: str, *, purpose: str) -> bool:
    """Return whether a key signed exactly this text for this purpose.

    Args:
        public: The public key, hex.
        text: What is said to be signed.
        signature: The signature, hex.
        purpose: What kind of thing it is.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), _framed(text, purpose))
    except (ValueError, InvalidSignature):
        return False
    return True


def fingerprint(public: str) -> str:
    """Return `sha256:...` of a public key, by which two people compare it.

    Args:
        public: The public key, hex.
    """
    return f"sha256:{hashlib.sha256(bytes.fromhex(public)).hexdigest()}"


def _framed(text: bytes, purpose: str) -> bytes:
    return b"fedllm own " + purpose.encode() + b"\0" + text
