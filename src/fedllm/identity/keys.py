"""Private keys: made, kept readable by their owner alone, and refused when exposed or weak."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from fedllm.disk import disk_error, make_private
from fedllm.errors import IdentityError

# NVIDIA FLARE registers clients with RSA signatures, so one RSA key serves TLS, registration and messages.
KEY_BITS = 3072
MIN_KEY_BITS = 2048
_MIN_EXPONENT = 65537
_MAX_KEY_FILE_BYTES = 2**16
_NEW_KEY = "make a new key: move the old one away and run `fedllm request`"


def new_key(*, bits: int = KEY_BITS) -> rsa.RSAPrivateKey:
    """Return a new private key.

    Args:
        bits: Length of the modulus.
    """
    return rsa.generate_private_key(public_exponent=_MIN_EXPONENT, key_size=bits)


def save_key(key: rsa.RSAPrivateKey, path: Path) -> None:
    """Write a private key that only its owner can read. No file is ever overwritten.

    Args:
        key: The key.
        path: A file that does not exist yet.

    Raises:
        IdentityError: `KEY_EXISTS`.
        ResourceError: `DISK_FULL`.
    """
    fix = "use the key that is there, or move it away; a new key needs a new certificate"
    save_private(_plain_pem(key), path, fix=fix)


def save_private(data: bytes, path: Path, *, fix: str) -> None:
    """Write a file that only its owner can read. No file is ever overwritten.

    Args:
        data: Its content.
        path: A file that does not exist yet.
        fix: What to do where there is one already.

    Raises:
        IdentityError: `KEY_EXISTS`.
        ResourceError: `DISK_FULL`.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise IdentityError("KEY_EXISTS", "there is a file already", where=str(path), fix=fix) from None
    except OSError as error:
        raise disk_error(error, path) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # Half a key would stand in the way of the next attempt.
        path.unlink(missing_ok=True)
        raise disk_error(error, path) from None


def make_missing_keys(paths: Iterable[Path]) -> None:
    """Make and save a key for each path that has none, on several cores at once.

    Args:
        paths: The files; their folders are made, for the owner alone.

    Raises:
        ResourceError: `DISK_FULL`.
    """

    def make(path: Path) -> None:
        save_key(new_key(), make_private(path.parent) / path.name)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(make, [path for path in paths if not path.exists()]))


def load_key(path: Path) -> rsa.RSAPrivateKey:
    """Return the private key in a file.

    Args:
        path: A PEM file, readable by its owner alone.

    Raises:
        IdentityError: `BAD_KEY`, `KEY_EXPOSED` or `WEAK_KEY`.
    """
    where, pem = str(path), read_private(path, fix="run `fedllm request` to make a key")
    try:
        # The library would test the primes, 0.14 s at every start. The site made them itself; that the numbers belong
        # together is what can go wrong, and `_belong_together` finds it in no time.
        key = serialization.load_pem_private_key(pem, password=None, unsafe_skip_rsa_key_validation=True)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # The reason that the library gives may quote the file, so it is not passed on.
        fix = "restore the file from a backup, or move it away and run `fedllm request`"
        raise IdentityError("BAD_KEY", "not a private key in plain PEM form", where=where, fix=fix) from None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise IdentityError("BAD_KEY", "not an RSA key", where=where, fix=_NEW_KEY)
    # One key has one spelling: so a change of any bit of the file is seen, also one that a lenient reader passes over.
    if not _belong_together(key.private_numbers()) or pem != _plain_pem(key):
        fix = f"restore it, or rewrite a key of your own: `openssl pkcs8 -topk8 -nocrypt -in {path} -out NEW.pem`"
        raise IdentityError("BAD_KEY", "changed, or not in PKCS#8 form", where=where, fix=fix)
    check_public_key(key.public_key(), where=where)
    return key


def _belong_together(key: rsa.RSAPrivateNumbers) -> bool:
    n, e = key.public_numbers.n, key.public_numbers.e
    if not 1 < key.q < n or not 1 < key.p < n or key.p * key.q != n:
        return False
    inverse = all(key.d * e % (prime - 1) == 1 for prime in (key.p, key.q))
    shortcuts = key.dmp1 == key.d % (key.p - 1) and key.dmq1 == key.d % (key.q - 1)
    return inverse and shortcuts and key.iqmp * key.q % key.p == 1


def _plain_pem(key: rsa.RSAPrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def read_private(path: Path, *, fix: str, max_bytes: int = _MAX_KEY_FILE_BYTES) -> bytes:
    """Return the content of a file that only its owner can read.

    Args:
        path: The file.
        fix: What to do where there is none.
        max_bytes: What is longer is cut off.

    Raises:
        IdentityError: `BAD_KEY` or `KEY_EXPOSED`.
    """
    try:
        # A pipe in the key's place must not make the program wait.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise IdentityError("BAD_KEY", "not a plain file", where=str(path), fix=fix)
            if mode := status.st_mode & 0o077:
                what = f"the key's file is open to others than its owner (mode {stat.S_IMODE(status.st_mode):04o})"
                fix = f"`chmod 600 {path}`; if others had access{' to write' if mode & 0o022 else ''}, make a new key"
                raise IdentityError("KEY_EXPOSED", what, where=str(path), fix=fix)
            return file.read(max_bytes)
    except OSError as error:
        raise IdentityError("BAD_KEY", f"cannot be read: {error.strerror}", where=str(path), fix=fix) from None


def check_public_key(key: object, *, where: str) -> rsa.RSAPublicKey:
    """Return a public key that is of the right kind and strong enough.

    Args:
        key: A public key of any kind.
        where: File or party, for the error.

    Raises:
        IdentityError: `BAD_KEY` or `WEAK_KEY`.
    """
    if not isinstance(key, rsa.RSAPublicKey):
        raise IdentityError("BAD_KEY", "not an RSA key", where=where, fix=_NEW_KEY)
    if key.key_size < MIN_KEY_BITS:
        what = f"an RSA key of {key.key_size} bits; {MIN_KEY_BITS} are the least"
        raise IdentityError("WEAK_KEY", what, where=where, fix=_NEW_KEY)
    if key.public_numbers().e < _MIN_EXPONENT:
        what = f"an RSA key with the exponent {key.public_numbers().e}; {_MIN_EXPONENT} is the least"
        raise IdentityError("WEAK_KEY", what, where=where, fix=_NEW_KEY)
    return key


def key_fingerprint(key: rsa.RSAPublicKey) -> str:
    """Return `sha256:...` of a public key, by which two people compare it.

    Args:
        key: The public key.
    """
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return f"sha256:{hashlib.sha256(spki).hexdigest()}"
