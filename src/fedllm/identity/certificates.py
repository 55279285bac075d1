"""Certificates: read, and held against the authority, the name, the key and the calendar."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import NameOID

from fedllm.errors import IdentityError
from fedllm.identity.keys import check_public_key

# What the library raises for certificates and requests that are broken or unusual.
UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    CryptographyDeprecationWarning,
)
_PEM_START = b"-----BEGIN CERTIFICATE-----"
_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_NEWEST_KIT = "ask the coordinator for a new kit (`fedllm provision` there), then `fedllm install`"


@dataclass(frozen=True)
class Holder:
    """Who a certificate must be of: the issuing authority's certificate and the name."""

    authority: x509.Certificate
    name: str


def read_certificate(pem: bytes, *, where: str) -> x509.Certificate:
    """Return the one certificate in a PEM file.

    Args:
        pem: The file's bytes.
        where: The file, for the error.

    Raises:
        IdentityError: `CERT_REFUSED`.
    """
    if pem.count(_PEM_START) != 1:
        raise _refused(f"holds {pem.count(_PEM_START)} certificates instead of one", where)
    try:
        return _parsed(pem)
    except UNREADABLE:
        raise _refused("not a certificate in PEM form", where) from None


def _parsed(pem: bytes) -> x509.Certificate:
    certificate = x509.load_pem_x509_certificate(pem)
    if certificate.serial_number < 1:
        # The library only warns of it. A filter that makes an error of the warning would do so in every thread.
        raise ValueError
    # The library reads these parts when they are first asked for; a broken one is to be found here, not later.
    _ = certificate.public_key(), certificate.subject, certificate.issuer, certificate.extensions
    _ = certificate.signature_hash_algorithm, certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return certificate


def common_name(subject: x509.Name) -> str:
    """Return the one common name of a subject, or an empty text.

    Args:
        subject: Whose name it is.
    """
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def check_holder(certificate: x509.Certificate, holder: Holder, *, where: str) -> None:
    """Return if the authority issued this certificate to this name, for no more than to be a member.

    Args:
        certificate: The certificate.
        holder: Who issued it, and to whom.
        where: File or party, for the error.

    Raises:
        IdentityError: `CERT_REFUSED`, `BAD_KEY` or `WEAK_KEY`.
    """
    if not isinstance(certificate.signature_hash_algorithm, _HASHES):
        raise _refused("signed with a hash that is no longer safe", where)
    try:
        certificate.verify_directly_issued_by(holder.authority)
    except (*UNREADABLE, InvalidSignature):
        own = certificate.issuer == certificate.subject
        raise _refused("it vouches for itself" if own else "not issued by the project's authority", where) from None
    if (name := common_name(certificate.subject)) != holder.name:
        raise _refused(f"it is the certificate of `{name[:64]}`, not of `{holder.name}`", where)
    if _is_authority(certificate):
        raise _refused("it could issue certificates itself", where)
    check_public_key(certificate.public_key(), where=where)


def check_authority(certificate: x509.Certificate, *, where: str) -> None:
    """Return if this is the certificate of an authority that vouches for itself.

    Args:
        certificate: The certificate.
        where: The file, for the error.

    Raises:
        IdentityError: `CERT_REFUSED`, `BAD_KEY` or `WEAK_KEY`.
    """
    check_public_key(certificate.public_key(), where=where)
    try:
        certificate.verify_directly_issued_by(certificate)
    except (*UNREADABLE, InvalidSignature):
        raise _refused("not signed by its own key", where) from None
    if not _is_authority(certificate):
        raise _refused("not the certificate of an authority", where)


def check_dates(certificate: x509.Certificate, *, where: str, now: datetime.datetime | None = None) -> None:
    """Return if a certificate is valid now.

    Args:
        certificate: The certificate.
        where: File or party, for the error.
        now: Another time than this machine's clock, with a time zone.

    Raises:
        IdentityError: `CERT_EXPIRED` or `CERT_NOT_YET_VALID`, with the date.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        what = (
            f"the certificate expired on {_day(certificate.not_valid_after_utc)}; this machine's clock says {_day(now)}"
        )
        raise IdentityError("CERT_EXPIRED", what, where=where, fix=_NEWEST_KIT)
    if now < certificate.not_valid_before_utc:
        begin = certificate.not_valid_before_utc
        what = f"the certificate is valid from {_day(begin)} on; this machine's clock says {_day(now)}"
        raise IdentityError("CERT_NOT_YET_VALID", what, where=where, fix="set this machine's clock")


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _day(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _refused(what: str, where: str) -> IdentityError:
    return IdentityError("CERT_REFUSED", what, where=where, fix=_NEWEST_KIT)
