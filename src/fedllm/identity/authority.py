"""The project's certificate authority, on the coordinator's machine."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm.disk import make_private, write_atomic
from fedllm.errors import IdentityError
from fedllm.identity.certificates import check_authority, check_dates, read_certificate
from fedllm.identity.keys import load_key, new_key, save_key
from fedllm.identity.requests import Request, read_request
from fedllm.identity.signing import Signer, fingerprint

Kind = Literal["party", "server", "admin"]
AUTHORITY_DAYS = 3650
# The clocks of two sites may be a day apart; a certificate must be valid at once at both.
_BACKDATED = datetime.timedelta(days=2)
# The role under which NVIDIA FLARE lets an identity submit and stop jobs.
_ADMIN_ROLE = "project_admin"
AUTHORITY_KEY_FILE = "ca.key"
AUTHORITY_FILE = "ca.pem"


@dataclass(frozen=True)
class Authority:
    """Signs certificates and kits for one project."""

    project: str
    certificate: x509.Certificate
    key: rsa.RSAPrivateKey

    @property
    def fingerprint(self) -> str:
        """`sha256:...` of the authority's certificate, by which a site knows it."""
        return fingerprint(self.certificate)

    @property
    def pem(self) -> bytes:
        """The authority's certificate in PEM form."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def signer(self) -> Signer:
        """Signs with the authority's key."""
        return Signer(self.key)

    def sign_request(self, csr_pem: bytes, *, kind: Kind, name: str, host: str | None = None, days: int = 365) -> bytes:
        """Return a certificate in PEM form for the key of a request. What else the request asks for is not given.

        Args:
            csr_pem: The request in PEM form.
            kind: What the holder may do.
            name: The holder's name; the request must be for it.
            host: Where the server is reached: IP address or DNS name; None for others.
            days: For how long; never longer than the authority itself.

        Raises:
            IdentityError: `REQUEST_REFUSED`, `BAD_KEY` or `WEAK_KEY`.
        """
        request = read_request(csr_pem, where=f"request of {name}", name=name)
        return self.issue(request, kind=kind, host=host, days=days)

    def issue(self, request: Request, *, kind: Kind, host: str | None = None, days: int = 365) -> bytes:
        """Return a certificate in PEM form for a request that was checked before.

        Args:
            request: The request.
            kind: What the holder may do.
            host: Where the server is reached; None for others.
            days: For how long; never longer than the authority itself.
        """
        now = datetime.datetime.now(datetime.UTC)
        end = min(now + datetime.timedelta(days=days), self.certificate.not_valid_after_utc)
        subject = _subject(request.name, self.project, role=_ADMIN_ROLE if kind == "admin" else None)
        builder = _builder(subject, self.certificate.subject, request.key, (now - _BACKDATED, end))
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = builder.add_extension(issuer, critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(authority=False), critical=True)
        # Without the server's purpose, a party's certificate cannot be used to pose as the server.
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if kind == "server":
            purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        if host is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternative_names(host)), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def create_authority(folder: Path, *, project: str, key: rsa.RSAPrivateKey | None = None) -> Authority:
    """Return the authority of a folder, made if there is none. A key that is there is used, never replaced.

    Args:
        folder: The authority's folder.
        project: The project's name.
        key: The key of a new authority; None makes one.

    Raises:
        IdentityError: The authority that is there is another project's, or cannot be used.
    """
    if (folder / AUTHORITY_FILE).exists():
        return open_authority(folder, project=project)
    make_private(folder)
    key_file = folder / AUTHORITY_KEY_FILE
    if not key_file.exists():
        save_key(key or new_key(), key_file)
    # A key without a certificate is what a crash between the two leaves; nothing was signed with it yet.
    key = load_key(key_file)
    certificate = _self_signed(key, project)
    write_atomic(folder / AUTHORITY_FILE, certificate.public_bytes(serialization.Encoding.PEM))
    return open_authority(folder, project=project)


def open_authority(folder: Path, *, project: str) -> Authority:
    """Return the authority of a folder.

    Args:
        folder: The authority's folder.
        project: The project whose authority it must be.

    Raises:
        IdentityError: It is absent, damaged, exposed, expired or another project's.
    """
    path = folder / AUTHORITY_FILE
    fix = "restore the folder from a backup; with a new authority every site must install again, and confirm it"
    if not path.is_file() or not (folder / AUTHORITY_KEY_FILE).is_file():
        raise IdentityError(
            "AUTHORITY_MISSING", f"`{AUTHORITY_KEY_FILE}` or `{path.name}` is absent", where=str(folder), fix=fix
        )
    certificate = read_certificate(path.read_bytes(), where=str(path))
    check_authority(certificate, where=str(path))
    key = load_key(folder / AUTHORITY_KEY_FILE)
    if key.public_key() != certificate.public_key():
        raise IdentityError("CERT_REFUSED", f"not the certificate of `{AUTHORITY_KEY_FILE}`", where=str(path), fix=fix)
    check_dates(certificate, where=str(path))
    if certificate.subject != _authority_subject(project):
        what = f"this is not the authority of the project `{project}`"
        fix = "use the project's name that the authority was made for, or another folder for another project"
        raise IdentityError("AUTHORITY_CHANGED", what, where=str(folder), fix=fix)
    return Authority(project, certificate, key)


def _authority_subject(project: str) -> x509.Name:
    return _subject(f"{project} authority", project, role=None)


def _subject(name: str, project: str, *, role: str | None) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, project)]
    if role is not None:
        parts.append(x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, role))
    return x509.Name(parts)


def _self_signed(key: rsa.RSAPrivateKey, project: str) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    subject = _authority_subject(project)
    span = (now - _BACKDATED, now + datetime.timedelta(days=AUTHORITY_DAYS))
    builder = _builder(subject, subject, key.public_key(), span)
    # It issues members only, no further authorities.
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(authority=True), critical=True)
    return builder.sign(key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: rsa.RSAPublicKey, span: tuple[datetime.datetime, datetime.datetime]
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(span[0]).not_valid_after(span[1])
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=not authority,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def alternative_names(host: str) -> list[x509.GeneralName]:
    """Return the names that a server's certificate holds; this machine's own names only where it is the server.

    Args:
        host: IP address or DNS name.
    """
    names = [host]
    if is_loopback(host):
        names += [other for other in ("localhost", "127.0.0.1") if other != host]
    return [_general_name(name) for name in names]


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine alone.

    Args:
        host: IP address or DNS name.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
