"""Time stamps (RFC 3161) on commitments: what an authority that is no party says of when a commitment was there.

Source: Adams et al. 2001, RFC 3161, sections 2.3 and 2.4.2; the checks are those of the library rfc3161-client, which
comes with the extra `fedllm[stamps]`. Differs: the stamped hash must be SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedllm.errors import ConfigError, ResourceError
from fedllm.ownership.claims import BOUND, Claim
from fedllm.ownership.disputes import Place, Standing

_SHA256 = "2.16.840.1.101.3.4.2.1"
_MAX_BYTES = 2**16
# How far the authority's clock and the log's may be apart; parties sign no head that is further off their own.
_CLOCKS = timedelta(hours=1)


@dataclass(frozen=True)
class _Bad(Exception):
    """Why a stamp proves nothing."""

    why: str


def read_certificates(paths: Sequence[Path]) -> list[x509.Certificate]:
    """Return the certificates of time stamping authorities that a verifier trusts.

    Args:
        paths: PEM files of one or more certificates each: of the authority's root, or of what is below it.

    Raises:
        ConfigError: `FILE_NOT_FOUND`; or `BAD_VALUE`, no certificate in PEM form.
        ResourceError: `DEVICE_MISSING`, the library that checks stamps is not installed.
    """
    if paths and importlib.util.find_spec("rfc3161_client") is None:
        what, fix = "checking a time stamp needs a library that is not installed", "pip install 'fedllm[stamps]'"
        raise ResourceError("DEVICE_MISSING", what, where="--tsa-certificate", fix=fix)
    return [certificate for path in paths for certificate in _certificates(path)]


def _certificates(path: Path) -> list[x509.Certificate]:
    fix = "give the authority's certificate as a PEM file"
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise ConfigError("FILE_NOT_FOUND", f"cannot read: {error.strerror}", where=str(path), fix=fix) from None
    except ValueError:
        raise ConfigError("BAD_VALUE", "no certificate in PEM form", where=str(path), fix=fix) from None


def with_stamp(found: Standing, claim: Claim, path: Path, trusted: Sequence[x509.Certificate]) -> Standing:
    """Return a claim's standing with its stamp verified: the time it says, or the reason why it proves nothing.

    A claim without a stamp stands as it did. A stamp that does not hold, or that is younger than the log says of
    itself, speaks against the claim.

    Args:
        found: From `standing`.
        claim: The claim, opened.
        path: The stamp, see `claims.stamp_file`.
        trusted: From `read_certificates`; of none, nothing is verified.
    """
    place = found.place
    if place is None or not place.stamp or not trusted:
        return found
    try:
        time = _stamped_at(_stamp(path, place), claim, trusted)
    except _Bad as bad:
        return Standing(place, (*found.reasons, f"its time stamp does not hold: {bad.why}"))
    return Standing(replace(place, stamp_time=time.isoformat()), (*found.reasons, *_against_the_log(time, place)))


def by_stamp(
    claim: Claim, path: Path, trusted: Sequence[x509.Certificate], *, seen: datetime | None = None
) -> Standing | None:
    """Return the standing of a claim that has no log, by a verified time stamp; None where nothing says when it was.

    Of text alone: where bits are is said by a log only.

    Args:
        claim: The claim, opened.
        path: The stamp, see `claims.stamp_file`.
        trusted: From `read_certificates`; of none, nothing is verified.
        seen: When the suspect model was first seen; the stamp must be older.
    """
    if claim.bits or not trusted or not path.is_file():
        return None
    try:
        time = _stamped_at(_read(path), claim, trusted)
    except _Bad as bad:
        return Standing(None, (f"its time stamp does not hold: {bad.why}",))
    late = f"its time stamp is of {time.isoformat()}, and the suspect was seen on {seen and seen.isoformat()} already"
    form = f"the claim is of the form `{claim.form}` and not of `{BOUND}`"
    reasons = (late,) * bool(seen and time >= seen) + (form,) * (claim.form != BOUND)
    return Standing(None, reasons, time.isoformat())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()[: _MAX_BYTES + 1]
    except OSError:
        raise _Bad(f"the file {path.name} is not beside the claim") from None


def _stamp(path: Path, place: Place) -> bytes:
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != place.stamp:
        raise _Bad(f"{path.name} is another stamp than the log names")
    return data


def _stamped_at(data: bytes, claim: Claim, trusted: Sequence[x509.Certificate]) -> datetime:
    from rfc3161_client import VerificationError, VerifierBuilder, decode_timestamp_response

    digest = bytes.fromhex(claim.commitment())
    try:
        answer = decode_timestamp_response(data)
        imprint = answer.tst_info.message_imprint
        if (imprint.hash_algorithm.dotted_string, imprint.message) != (_SHA256, digest):
            raise _Bad("it is on another digest than the commitment's")
        if not all(_is_for_stamps(one) for one in _signers(answer)):
            raise _Bad("the certificate of its signer is not for time stamping")
        VerifierBuilder(roots=list(trusted)).build().verify(answer, digest)
        time: datetime = answer.tst_info.gen_time
    except VerificationError:
        # What the library says is a stack of another library's errors.
        raise _Bad("no certificate that was named vouches for the authority that signed it") from None
    except ValueError:
        raise _Bad("it is no answer of a time stamping authority") from None
    return time


def _signers(answer: Any) -> Iterator[x509.Certificate]:
    names = {(one.issuer, one.serial_number) for one in answer.signed_data.signer_infos}
    for der in answer.signed_data.certificates:
        certificate = x509.load_der_x509_certificate(der)
        if (certificate.issuer, certificate.serial_number) in names:
            yield certificate


def _is_for_stamps(certificate: x509.Certificate) -> bool:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    except x509.ExtensionNotFound:
        return False
    return usage.critical and ExtendedKeyUsageOID.TIME_STAMPING in usage.value


def _against_the_log(time: datetime, place: Place) -> Iterator[str]:
    if time > datetime.fromisoformat(place.time) + _CLOCKS:
        yield f"its time stamp is of {time.isoformat()}, and the log says that it was there before {place.time}"
