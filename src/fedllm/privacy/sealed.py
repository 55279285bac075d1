"""Something long for several receivers, past someone who passes it on: sealed once, and its key for each of them.

Source: the key by HPKE, RFC 9180, base mode (X25519, HKDF-SHA256, ChaCha20-Poly1305); the pieces by ChaCha20-Poly1305,
RFC 8439. Differs: no.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from fedllm.errors import PayloadError

KEY_BYTES = 32
_NONCE_BYTES = 12
# By how much a sealed piece is longer than the piece.
OVERHEAD_BYTES = _NONCE_BYTES + 16
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


def public_hex(key: X25519PrivateKey) -> str:
    """Return the public half of a key, hex.

    Args:
        key: The key.
    """
    return key.public_key().public_bytes_raw().hex()


def sealed_for(secret: bytes, public: str, *, context: bytes) -> str:
    """Return a secret that only the holder of a key can open, hex.

    Args:
        secret: What to seal.
        public: From `public_hex`.
        context: What it is for; the same bytes open it.

    Raises:
        PayloadError: `PAYLOAD_REFUSED`, that is no key.
    """
    try:
        return _SUITE.encrypt(secret, X25519PublicKey.from_public_bytes(bytes.fromhex(public)), context).hex()
    except ValueError:
        raise PayloadError("PAYLOAD_REFUSED", "what was shown is no public key") from None


def unsealed(box: str, key: X25519PrivateKey, *, context: bytes) -> bytes:
    """Return a secret that was sealed for a key.

    Args:
        box: From `sealed_for`.
        key: One's own.
        context: As it was sealed.

    Raises:
        PayloadError: `PAYLOAD_REFUSED`, it was sealed for another key or something else, or was changed.
    """
    try:
        return _SUITE.decrypt(bytes.fromhex(box), key, context)
    except (InvalidTag, ValueError):
        raise PayloadError("PAYLOAD_REFUSED", "what was sealed cannot be opened with this key") from None


@dataclass(frozen=True)
class Pieces:
    """Seals and opens numbered pieces under one key.

    Args:
        context: What they are of.
        key: 32 bytes; by default drawn.
    """

    context: bytes
    key: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES), repr=False)

    def sealed(self, number: int, data: bytes) -> bytes:
        """Return a piece that only holders of the key can open, longer by `OVERHEAD_BYTES`.

        Args:
            number: Which piece.
            data: Its bytes.
        """
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + ChaCha20Poly1305(self.key).encrypt(nonce, data, self._about(number))

    def opened(self, number: int, box: bytes) -> bytes:
        """Return a piece.

        Args:
            number: Which piece it must be.
            box: From `sealed`.

        Raises:
            PayloadError: `PAYLOAD_REFUSED`, it is another piece, or was changed.
        """
        try:
            return ChaCha20Poly1305(self.key).decrypt(box[:_NONCE_BYTES], box[_NONCE_BYTES:], self._about(number))
        except (InvalidTag, ValueError):
            raise PayloadError("PAYLOAD_REFUSED", f"piece {number} cannot be opened") from None

    def _about(self, number: int) -> bytes:
        return b"%d\0" % number + self.context
