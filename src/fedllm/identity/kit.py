"""Start-up kits: everything a site needs but its own key, signed by the authority and verified at every start."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedllm.errors import IdentityError
from fedllm.identity.authority import Authority, Kind
from fedllm.identity.certificates import Holder, check_authority, check_dates, check_holder, read_certificate
from fedllm.identity.files import ADMIN, KEY_FILE, KIT_FOLDER, PIN_FILE, SERVER
from fedllm.identity.keys import check_public_key, key_fingerprint, load_key
from fedllm.identity.signing import Roster, fingerprint, is_signed

MANIFEST, SIGNATURE, AUTHORITY, CERTIFICATE = "kit.json", "kit.sig", "ca.pem", "cert.pem"
MAX_FILE_BYTES = 2**20
_NAME = r"^[a-z0-9][a-z0-9_-]{0,31}$"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_AGAIN = "install the kit again; if nobody knows who changed it, look over this machine first"


class Address(BaseModel):
    """Where the server is reached."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    host: str = Field(min_length=1, max_length=255)
    port: int = Field(ge=1, le=65535)


class Manifest(BaseModel):
    """What `kit.json` says; the authority signs its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    project: str = Field(pattern=_NAME)
    name: str = Field(pattern=_NAME)
    kind: Kind
    server: Address
    roster: dict[str, str]
    files: dict[str, str]
    issued: datetime.datetime


@dataclass(frozen=True)
class Kit:
    """A kit that was verified as a whole a moment ago."""

    project: str
    name: str
    kind: Kind
    host: str
    port: int
    roster: Roster
    authority: str
    issued: datetime.datetime
    expires: datetime.datetime
    site: Path

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.site / KIT_FOLDER / AUTHORITY

    @property
    def cert(self) -> Path:
        """This site's certificate."""
        return self.site / KIT_FOLDER / CERTIFICATE

    @property
    def key(self) -> Path:
        """This site's private key."""
        return self.site / KEY_FILE


@dataclass(frozen=True)
class Content:
    """What a kit says, before it is signed; certificates are in PEM form."""

    project: str
    name: str
    kind: Kind
    server: Address
    certificate: bytes
    roster: Mapping[str, bytes]


def signed_files(authority: Authority, content: Content, *, issued: datetime.datetime) -> dict[str, bytes]:
    """Return the files of a kit, by their relative paths.

    Args:
        authority: Who signs it.
        content: What it says.
        issued: When it is made, with a time zone.
    """
    files = {AUTHORITY: authority.pem, CERTIFICATE: content.certificate}
    files |= {_roster_file(name): pem for name, pem in sorted(content.roster.items())}
    manifest = Manifest(
        project=content.project,
        name=content.name,
        kind=content.kind,
        server=content.server,
        roster={name: _fingerprint_of(pem, name) for name, pem in sorted(content.roster.items())},
        files={path: _digest(data) for path, data in files.items()},
        issued=issued,
    )
    text = (manifest.model_dump_json(indent=2) + "\n").encode()
    return {MANIFEST: text, SIGNATURE: authority.signer.sign(text, purpose="kit"), **files}


@dataclass(frozen=True)
class Verified:
    """What the files of a kit prove."""

    manifest: Manifest
    authority: x509.Certificate
    certificate: x509.Certificate
    roster: Roster


def verify_files(
    files: Mapping[str, bytes], *, pin: str | None, where: str, now: datetime.datetime | None = None
) -> Verified:
    """Return what the files of a kit prove, after verifying every one of them.

    Args:
        files: Relative path -> content.
        pin: The authority's fingerprint that is trusted; None trusts the one in the kit, to show it.
        where: The folder or archive, for the errors.
        now: Another time than this machine's clock.

    Raises:
        IdentityError: With the file that is wrong.
    """
    authority = _authority(files, pin, where)
    manifest = _manifest(files, authority, where)
    _check_digests(files, manifest, where)
    check_dates(authority, where=f"{where}/{AUTHORITY}", now=now)
    certificate = _member(files[CERTIFICATE], Holder(authority, manifest.name), f"{where}/{CERTIFICATE}")
    check_dates(certificate, where=f"{where}/{CERTIFICATE}", now=now)
    members = {
        name: _member(files[_roster_file(name)], Holder(authority, name), f"{where}/{_roster_file(name)}")
        for name in manifest.roster
    }
    _check_roster(manifest, certificate, members, where)
    # Of the others only the server is needed by everyone; a party that expired keeps nobody else from working.
    check_dates(members[SERVER], where=f"{where}/{_roster_file(SERVER)}", now=now)
    return Verified(manifest, authority, certificate, Roster(members))


def open_kit(site: Path, *, now: datetime.datetime | None = None) -> Kit:
    """Return a site's kit, after verifying everything: authority, signature, files, certificates, dates and key.

    Args:
        site: The site's folder.
        now: Another time than this machine's clock, with a time zone.

    Raises:
        IdentityError: With the file that is wrong; nothing may be started.
    """
    folder = site / KIT_FOLDER
    if not folder.is_dir():
        fix = "`fedllm request party.yaml`, send the request to the coordinator, then `fedllm install` the kit"
        raise IdentityError("KIT_MISSING", "no start-up kit is installed", where=str(site), fix=fix)
    pin = pinned(site)
    if pin is None:
        fix = "ask the coordinator for the fingerprint, then `fedllm install` the kit with `--authority`"
        raise IdentityError("AUTHORITY_UNCONFIRMED", f"there is no `{PIN_FILE}`", where=str(site), fix=fix)
    verified = verify_files(read_folder(folder), pin=pin, where=str(folder), now=now)
    check_key(verified, site)
    return _kit(verified, site)


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the files of an installed kit, by their relative paths.

    Args:
        folder: The site's `kit` folder.

    Raises:
        IdentityError: `KIT_DAMAGED`: it holds what is no plain file, or cannot be read.
    """
    files = {}
    todo = [folder]
    try:
        for path in (path for each in todo for path in sorted(each.iterdir())):
            name = path.relative_to(folder).as_posix()
            if name == "roster" and path.is_dir() and not path.is_symlink():
                todo.append(path)
                continue
            if path.is_symlink() or not path.is_file():
                raise damaged("is not a plain file", str(path))
            with path.open("rb") as file:
                files[name] = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise damaged(f"cannot be read: {error.strerror}", str(error.filename)) from None
    return files


def installed_manifest(site: Path) -> Manifest | None:
    """Return what the kit at a site says of itself, unverified; None if there is none that can be read.

    Args:
        site: The site's folder.
    """
    try:
        return Manifest.model_validate_json((site / KIT_FOLDER / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None


def check_key(verified: Verified, site: Path) -> None:
    """Return if the site's key is the one that the kit's certificate is for.

    Args:
        verified: The kit.
        site: The site's folder.

    Raises:
        IdentityError: `CERT_REFUSED`, or what `load_key` raises.
    """
    key = load_key(site / KEY_FILE)
    if key.public_key() != verified.certificate.public_key():
        what = f"the kit's certificate is for another key ({key_fingerprint(_key_of(verified.certificate))})"
        fix = "put the key back that the request was made with, or send the newest request to the coordinator"
        raise IdentityError("CERT_REFUSED", what, where=str(site / KEY_FILE), fix=fix)


def pinned(site: Path) -> str | None:
    """Return the fingerprint of the authority that a site trusts, or None before its first kit.

    Args:
        site: The site's folder.

    Raises:
        IdentityError: `KIT_DAMAGED`.
    """
    path = site / PIN_FILE
    try:
        text = path.read_bytes()[:256].decode("ascii", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise damaged(f"cannot be read: {error.strerror}", str(path)) from None
    if not _DIGEST.fullmatch(text.removesuffix("\n")) or not text.endswith("\n"):
        raise damaged("not a fingerprint", str(path))
    return text.removesuffix("\n")


def days_left(kit: Kit, *, now: datetime.datetime | None = None) -> int:
    """Return for how many whole days a kit is still valid; below 30 is the time to renew it.

    Args:
        kit: The kit.
        now: Another time than this machine's clock, with a time zone.
    """
    return (kit.expires - (now or datetime.datetime.now(datetime.UTC))).days


def damaged(what: str, where: str) -> IdentityError:
    """Return the error to raise when a file of a kit is not as it was signed.

    Args:
        what: What is wrong.
        where: The file.
    """
    return IdentityError("KIT_DAMAGED", what, where=where, fix=_AGAIN)


def _authority(files: Mapping[str, bytes], pin: str | None, where: str) -> x509.Certificate:
    for needed in (MANIFEST, SIGNATURE, AUTHORITY, CERTIFICATE):
        if needed not in files:
            raise damaged("is missing", f"{where}/{needed}")
    place = f"{where}/{AUTHORITY}"
    try:
        authority = read_certificate(files[AUTHORITY], where=place)
        check_authority(authority, where=place)
    except IdentityError as error:
        raise damaged(error.what, place) from None
    if pin is not None and fingerprint(authority) != pin:
        what = f"the kit is from the authority {fingerprint(authority)}, and {pin} is trusted here"
        fix = (
            f"ask the coordinator; for a new authority on purpose move `{PIN_FILE}` away, and install with --authority"
        )
        raise IdentityError("AUTHORITY_CHANGED", what, where=place, fix=fix)
    return authority


def _manifest(files: Mapping[str, bytes], authority: x509.Certificate, where: str) -> Manifest:
    if not is_signed(_key_of(authority), files[MANIFEST], files[SIGNATURE], purpose="kit"):
        raise damaged(f"`{MANIFEST}` and `{SIGNATURE}` do not agree: one was changed", f"{where}/{MANIFEST}")
    try:
        return Manifest.model_validate_json(files[MANIFEST])
    except ValidationError:
        fix = "install the same version of fedllm at the coordinator and at every site"
        what = "signed, but not in the layout that this version of fedllm knows"
        raise IdentityError("KIT_REFUSED", what, where=f"{where}/{MANIFEST}", fix=fix) from None


def _check_digests(files: Mapping[str, bytes], manifest: Manifest, where: str) -> None:
    for path in sorted(set(files) - set(manifest.files) - {MANIFEST, SIGNATURE}):
        raise damaged("is not a part of the kit: it was added", f"{where}/{path}")
    expected = {AUTHORITY, CERTIFICATE, *map(_roster_file, manifest.roster)}
    for path in sorted(expected ^ set(manifest.files)):
        raise damaged(f"`{MANIFEST}` contradicts itself", f"{where}/{path}")
    for path, digest in manifest.files.items():
        if path not in files:
            raise damaged("is missing", f"{where}/{path}")
        if _digest(files[path]) != digest:
            raise damaged("was changed", f"{where}/{path}")


def _check_roster(
    manifest: Manifest, certificate: x509.Certificate, members: Mapping[str, x509.Certificate], where: str
) -> None:
    holders: dict[bytes, str] = {}
    for name, member in members.items():
        place = f"{where}/{_roster_file(name)}"
        if fingerprint(member) != manifest.roster[name]:
            raise damaged("is not the certificate that the roster names", place)
        key = key_fingerprint(_key_of(member)).encode()
        if (other := holders.setdefault(key, name)) != name:
            raise damaged(f"`{name}` and `{other}` have the same key", place)
    if SERVER not in members:
        raise damaged("the roster has no server", f"{where}/{MANIFEST}")
    own = {"server": SERVER, "admin": ADMIN}.get(manifest.kind, manifest.name)
    listed = members.get(manifest.name)
    if manifest.name != own or (listed is None) != (manifest.kind == "admin"):
        raise damaged(f"`{manifest.name}` is not on the roster as {manifest.kind}", f"{where}/{MANIFEST}")
    if listed is not None and listed != certificate:
        raise damaged("is not the certificate that the roster names", f"{where}/{CERTIFICATE}")


def _member(pem: bytes, holder: Holder, where: str) -> x509.Certificate:
    certificate = read_certificate(pem, where=where)
    check_holder(certificate, holder, where=where)
    return certificate


def _kit(verified: Verified, site: Path) -> Kit:
    manifest = verified.manifest
    return Kit(
        project=manifest.project,
        name=manifest.name,
        kind=manifest.kind,
        host=manifest.server.host,
        port=manifest.server.port,
        roster=verified.roster,
        authority=fingerprint(verified.authority),
        issued=manifest.issued,
        expires=min(verified.authority.not_valid_after_utc, verified.certificate.not_valid_after_utc),
        site=site,
    )


def _roster_file(name: str) -> str:
    return f"roster/{name}.pem"


def _fingerprint_of(pem: bytes, name: str) -> str:
    return fingerprint(read_certificate(pem, where=name))


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _key_of(certificate: x509.Certificate) -> rsa.RSAPublicKey:
    return check_public_key(certificate.public_key(), where=certificate.subject.rfc4514_string())
