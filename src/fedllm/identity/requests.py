"""Requests for a certificate: made where the private key stays, checked where they arrive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from fedllm.disk import make_private, write_atomic
from fedllm.errors import IdentityError
from fedllm.identity.certificates import UNREADABLE, common_name
from fedllm.identity.files import KEY_FILE, REQUEST_FILE
from fedllm.identity.keys import check_public_key, key_fingerprint, load_key, new_key, save_key

_MAX_BYTES = 2**15
_PEM_START = b"-----BEGIN CERTIFICATE REQUEST-----"
_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)


@dataclass(frozen=True)
class Request:
    """A request whose sender holds the private key. Of what it asks for, only name and key are used."""

    name: str
    key: rsa.RSAPublicKey
    pem: bytes

    @property
    def fingerprint(self) -> str:
        """`sha256:...` of the key."""
        return key_fingerprint(self.key)


def make_request(site: Path, name: str) -> Path:
    """Return a new request for a certificate. The site's key is made if there is none; it never leaves.

    Args:
        site: The site's folder; made if absent.
        name: The party's name.

    Raises:
        IdentityError: The key that is there cannot be used.
    """
    make_private(site)
    key_file = site / KEY_FILE
    if not key_file.exists():
        save_key(new_key(), key_file)
    key = load_key(key_file)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    write_atomic(site / REQUEST_FILE, request.public_bytes(serialization.Encoding.PEM))
    return site / REQUEST_FILE


def load_request(path: Path, *, name: str | None = None) -> Request:
    """Return the request in a file, checked as `read_request` does.

    Args:
        path: The file.
        name: Whose request it must be; None takes the name in it.

    Raises:
        IdentityError: `REQUEST_REFUSED`, `BAD_KEY` or `WEAK_KEY`.
    """
    try:
        with path.open("rb") as file:
            pem = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise _refused(f"cannot be read: {error.strerror}", str(path)) from None
    return read_request(pem, where=str(path), name=name)


def read_request(pem: bytes, *, where: str, name: str | None = None) -> Request:
    """Return a request after checking its signature, its key and its name.

    Args:
        pem: The request in PEM form.
        where: The file, for the error.
        name: Whose request it must be; None takes the name in it.

    Raises:
        IdentityError: `REQUEST_REFUSED`, `BAD_KEY` or `WEAK_KEY`.
    """
    if len(pem) > _MAX_BYTES or pem.count(_PEM_START) != 1:
        raise _refused("not one certificate request in PEM form", where)
    try:
        request = x509.load_pem_x509_csr(pem)
        key = check_public_key(request.public_key(), where=where)
        signed = request.is_signature_valid and isinstance(request.signature_hash_algorithm, _HASHES)
        found = common_name(request.subject)
    except UNREADABLE:
        raise _refused("a certificate request that cannot be read", where) from None
    if not signed:
        raise _refused("not signed by the key that it names", where)
    if not found or (name is not None and found != name):
        raise _refused(f"it is for the name `{found[:64]}`, not for `{name or '(one name)'}`", where)
    return Request(found, key, pem)


def _refused(what: str, where: str) -> IdentityError:
    fix = "let the party run `fedllm request party.yaml` and send the file that it names"
    return IdentityError("REQUEST_REFUSED", what, where=where, fix=fix)
