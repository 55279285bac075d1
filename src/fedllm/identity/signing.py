"""Signatures of messages, approvals and kits, and the roster by which they are verified."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from fedllm.errors import SenderRefused, nearest
from fedllm.identity.keys import check_public_key

# What is signed is named inside the signature, so that none can be passed off as one of another kind.
Purpose = Literal["message", "approval", "audit", "job", "kit", "run", "sum"]
_HASH = hashes.SHA256()
_PADDING = padding.PSS(mgf=padding.MGF1(_HASH), salt_length=padding.PSS.DIGEST_LENGTH)


class Signer:
    """Signs with one private key. Threads may share it.

    Args:
        key: The private key.
    """

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        self._key = key

    def sign(self, data: bytes, *, purpose: Purpose = "message") -> bytes:
        """Return a signature, RSA-PSS with SHA-256.

        Args:
            data: What is signed.
            purpose: What kind of thing it is.
        """
        return self._key.sign(_framed(data, purpose), _PADDING, _HASH)


class Roster:
    """Who belongs to the project, by certificate. It trusts what it is given: `open_kit` checks each certificate.

    Args:
        certificates: Name of a party, or `server` -> its certificate.

    Raises:
        IdentityError: `BAD_KEY` or `WEAK_KEY`: a certificate's key cannot be used.
    """

    def __init__(self, certificates: Mapping[str, x509.Certificate]) -> None:
        self._certificates = dict(certificates)
        self._keys = {name: check_public_key(cert.public_key(), where=name) for name, cert in certificates.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._certificates

    def __iter__(self) -> Iterator[str]:
        return iter(self._certificates)

    def __len__(self) -> int:
        return len(self._certificates)

    def verify(self, name: str, data: bytes, signature: bytes, *, purpose: Purpose = "message") -> None:
        """Return if the named party signed exactly these data. The certificate's dates are not looked at.

        Args:
            name: Who is said to have signed.
            data: What is said to be signed.
            signature: The signature.
            purpose: What kind of thing it is.

        Raises:
            SenderRefused: `NOT_ON_ROSTER` or `BAD_SIGNATURE`.
        """
        self.certificate(name)
        if not is_signed(self._keys[name], data, signature, purpose=purpose):
            fix = "nothing of it is used; ask the party whether it has a new key, and install the newest kits"
            raise SenderRefused("BAD_SIGNATURE", f"not signed by the key of `{name}`", where=name, fix=fix)

    def certificate(self, name: str) -> x509.Certificate:
        """Return the certificate of a party.

        Args:
            name: The party, or `server`.

        Raises:
            SenderRefused: `NOT_ON_ROSTER`.
        """
        if name not in self._certificates:
            hint = nearest(name, self._certificates) if len(name) <= 64 else ""
            fix = f"{hint} `fedllm provision` adds a party; each site then installs its new kit".strip()
            raise SenderRefused("NOT_ON_ROSTER", f"`{name[:64]}` is not on the roster", fix=fix)
        return self._certificates[name]

    def fingerprint(self, name: str) -> str:
        """Return `sha256:...` of a party's certificate.

        Args:
            name: The party, or `server`.

        Raises:
            SenderRefused: `NOT_ON_ROSTER`.
        """
        return fingerprint(self.certificate(name))


def is_signed(key: rsa.RSAPublicKey, data: bytes, signature: bytes, *, purpose: Purpose = "message") -> bool:
    """Return whether a key signed exactly these data for this purpose.

    Args:
        key: The signer's public key.
        data: What is said to be signed.
        signature: The signature.
        purpose: What kind of thing it is.
    """
    try:
        key.verify(signature, _framed(data, purpose), _PADDING, _HASH)
    except InvalidSignature:
        return False
    return True


def fingerprint(certificate: x509.Certificate) -> str:
    """Return `sha256:...` of a certificate's DER form.

    Args:
        certificate: The certificate.
    """
    return f"sha256:{certificate.fingerprint(_HASH).hex()}"


def _framed(data: bytes, purpose: Purpose) -> bytes:
    return b"fedllm " + purpose.encode() + b"\0" + data
