"""Secret random numbers that can be drawn again: a key, labels, and a stream of AES in counter mode for each label.

The training's own generators are no good for noise: who knows the job's seed could take it away again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path

import numpy as np

from fedllm.disk import disk_error, sync_folder
from fedllm.errors import StateLost

KEY_BYTES = 32


def noise_key(path: Path) -> bytes:
    """Return the key in a file; a new one is drawn and written, for its owner alone, where there is none.

    Args:
        path: The file.

    Raises:
        StateLost: `STATE_CORRUPT`, the file holds no key.
        ResourceError: `DISK_FULL`.
    """
    if path.exists():
        key = path.read_bytes()
        if len(key) != KEY_BYTES:
            fix = "put the file back from a backup; without it the run cannot be resumed"
            raise StateLost("STATE_CORRUPT", "the key of the noise is damaged", where=str(path), fix=fix)
        return key
    key, draft = secrets.token_bytes(KEY_BYTES), path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from None
    return key


def key_name(key: bytes) -> str:
    """Return a name for a key that tells nothing of it.

    Args:
        key: The key.
    """
    return hashlib.sha256(b"fedllm noise key" + key).hexdigest()[:16]


class NoiseStream:
    """Numbers that follow from a secret key and labels. The same labels give the same bits again.

    Args:
        key: 32 random bytes.
        labels: What the numbers are for, such as the run, the round, and what the round starts from.
    """

    def __init__(self, key: bytes, *labels: str | int) -> None:
        self._key, self._labels = key, labels

    def uniforms(self, count: int, *labels: str | int) -> np.ndarray:
        """Return numbers from [0, 1) of 53 random bits each, float64, shape (count,).

        Args:
            count: How many.
            labels: What these are for.
        """
        bits = np.frombuffer(self._bytes(8 * count, labels), dtype="<u8")
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normals(self, count: int, *labels: str | int) -> np.ndarray:
        """Return standard normal numbers, float64, shape (count,), by the method of Box and Muller.

        Source: Box and Muller 1958. Differs: no. None lies beyond 8.6 standard deviations, which 1 in 10^17 would.

        Args:
            count: How many.
            labels: What these are for.
        """
        pairs = -(-count // 2)
        drawn = self.uniforms(2 * pairs, *labels)
        # 1 - u is never 0.
        radius, angle = np.sqrt(-2.0 * np.log1p(-drawn[:pairs])), 2.0 * np.pi * drawn[pairs:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def _bytes(self, count: int, labels: tuple[str | int, ...]) -> bytes:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        info = json.dumps([*self._labels, "/", *labels], ensure_ascii=False, separators=(",", ":")).encode()
        own = HKDF(SHA256(), 32, salt=b"fedllm noise", info=info).derive(self._key)
        # Each label has a key of its own, so that no counter is ever used twice.
        return Cipher(algorithms.AES(own), modes.CTR(bytes(16))).encryptor().update(bytes(count))
