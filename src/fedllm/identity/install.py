"""Kits as archives: packed at the coordinator, verified in memory at the site, and only then unpacked."""

from __future__ import annotations

import datetime
import io
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from fedllm.disk import disk_error, make_private, sync_folder, write_atomic
from fedllm.errors import ConfigError, IdentityError
from fedllm.identity.authority import Authority
from fedllm.identity.files import KIT_FOLDER, PIN_FILE
from fedllm.identity.kit import (
    MAX_FILE_BYTES,
    Content,
    Kit,
    Manifest,
    check_key,
    installed_manifest,
    open_kit,
    pinned,
    signed_files,
    verify_files,
)
from fedllm.identity.signing import fingerprint

_MEMBER = re.compile(r"kit\.json|kit\.sig|ca\.pem|cert\.pem|roster/[a-z0-9][a-z0-9_-]{0,31}\.pem")
_MAX_MEMBERS = 2000
# A kit for a thousand parties is below half of each.
_MAX_BYTES = 2**22
_MAX_UNPACKED = 2**23
_MAX_RATIO = 100
_DIGEST = re.compile(r"(sha256:)?([0-9a-f]{64})")


def build_kit(authority: Authority, content: Content, *, issued: datetime.datetime | None = None) -> bytes:
    """Return a kit as a zip archive.

    Args:
        authority: Who signs it.
        content: What it says.
        issued: When it is made, with a time zone; None is now.
    """
    return pack(signed_files(authority, content, issued=issued or datetime.datetime.now(datetime.UTC)))


def pack(files: Mapping[str, bytes]) -> bytes:
    """Return files as a zip archive, the same bytes for the same files.

    Args:
        files: Relative path -> content.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(zipfile.ZipInfo(path), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def unpack(data: bytes, *, where: str) -> dict[str, bytes]:
    """Return the files in a kit's archive. Nothing is written.

    Args:
        data: The archive.
        where: Its name, for the errors.

    Raises:
        IdentityError: `KIT_REFUSED`: it holds anything but the plain files of a kit, or too much.
    """
    if len(data) > _MAX_BYTES:
        raise _refused(f"more than {_MAX_BYTES} bytes", where)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            _check_members(members, where)
            return {member.filename: _content(archive, member) for member in members}
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError):
        raise _refused("not a whole zip archive of a kit", where) from None


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    # Read with a bound: without one, a stream that is longer than it says is unpacked whole before it is cut.
    with archive.open(member) as file:
        return file.read(member.file_size + 1)


def _check_members(members: list[zipfile.ZipInfo], where: str) -> None:
    names = [member.filename.casefold() for member in members]
    if len(members) > _MAX_MEMBERS or len(set(names)) < len(names):
        raise _refused("too many files, or two with the same name", where)
    if sum(member.file_size for member in members) > _MAX_UNPACKED:
        raise _refused(f"more than {_MAX_UNPACKED} bytes when unpacked", where)
    for member in members:
        # The name as it stands in the archive, before the library cuts it at a null byte.
        if not _MEMBER.fullmatch(member.orig_filename):
            raise _refused(f"{member.orig_filename[:80]!r} is no file of a kit", where)
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
            raise _refused(f"`{member.filename}` is not a plain file", where)
        if member.file_size > MAX_FILE_BYTES or member.file_size > _MAX_RATIO * max(member.compress_size, 1):
            raise _refused(f"`{member.filename}` is too large, or packed too tightly", where)
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _refused(f"`{member.filename}` is packed in an unusual way", where)


def read_kit(zip_path: Path) -> dict[str, bytes]:
    """Return the files in a kit, unverified. Nothing is written.

    Args:
        zip_path: The kit.

    Raises:
        ConfigError: `FILE_NOT_FOUND`.
        IdentityError: `KIT_REFUSED`.
    """
    return unpack(_read(zip_path), where=str(zip_path))


def kit_authority(zip_path: Path) -> str:
    """Return the fingerprint of the authority that a kit is from, for somebody to confirm it.

    Args:
        zip_path: The kit.

    Raises:
        IdentityError: The kit is not whole.
    """
    files = read_kit(zip_path)
    return fingerprint(verify_files(files, pin=None, where=str(zip_path)).authority)


def install_kit(zip_path: Path, site: Path, *, authority: str | None, name: str | None = None) -> Kit:
    """Return the kit, installed in a site's folder in place of an older one. It is verified before any write.

    Args:
        zip_path: The kit.
        site: The site's folder, with the key that its request was made with.
        authority: The authority's fingerprint, needed for a first kit; later ones must be from the same authority.
        name: Whose kit it must be; None takes any that fits the key.

    Raises:
        ConfigError: `BAD_VALUE`: `authority` is no fingerprint.
        IdentityError: The kit is refused; the one that was installed stays.
    """
    return install_files(read_kit(zip_path), site, authority=authority, name=name, where=str(zip_path))


def install_files(
    files: Mapping[str, bytes], site: Path, *, authority: str | None, name: str | None = None, where: str = KIT_FOLDER
) -> Kit:
    """Return the kit made of these files, installed as `install_kit` does.

    Args:
        files: Relative path -> content.
        site: The site's folder.
        authority: The authority's fingerprint, or None.
        name: Whose kit it must be, or None.
        where: Where the files are from, for the errors.

    Raises:
        ConfigError: `BAD_VALUE`: `authority` is no fingerprint.
        IdentityError: The kit is refused; the one that was installed stays.
    """
    given = None if authority is None else _fingerprint(authority)
    pin = pinned(site)
    if pin is not None and given is not None and pin != given:
        fix = f"for a new authority on purpose move `{PIN_FILE}` away first"
        raise IdentityError("AUTHORITY_CHANGED", f"{pin} is trusted here", where=str(site / PIN_FILE), fix=fix)
    verified = verify_files(files, pin=pin or given, where=where)
    if pin is None and given is None:
        found = fingerprint(verified.authority)
        fix = f"ask the coordinator, not by the way the kit came; if it is the same, add `--authority {found}`"
        raise IdentityError("AUTHORITY_UNCONFIRMED", f"the kit is from the authority {found}", where=where, fix=fix)
    if name is not None and verified.manifest.name != name:
        raise _refused(f"it is the kit of `{verified.manifest.name}`, not of `{name}`", where)
    _check_newer(verified.manifest, site, where)
    check_key(verified, site)
    make_private(site)
    if pin is None:
        write_atomic(site / PIN_FILE, f"{fingerprint(verified.authority)}\n".encode())
    _put_in_place(files, site)
    return open_kit(site)


def _check_newer(manifest: Manifest, site: Path, where: str) -> None:
    if (installed := installed_manifest(site)) is None:
        return
    if installed.project != manifest.project:
        raise _refused(f"it is of the project `{manifest.project}`, and `{installed.project}` is installed", where)
    if installed.issued > manifest.issued:
        # An older roster may hold a party that was since put off it.
        dates = f"{manifest.issued:%Y-%m-%d %H:%M:%S}, and one of {installed.issued:%Y-%m-%d %H:%M:%S} is installed"
        raise _refused(f"it is of {dates}", where)


def _put_in_place(files: Mapping[str, bytes], site: Path) -> None:
    new, old, place = site / ".kit.new", site / ".kit.old", site / KIT_FOLDER
    try:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        (new / "roster").mkdir(parents=True)
        for path, data in files.items():
            with (new / path).open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if place.exists():
            place.replace(old)
        new.replace(place)
        sync_folder(site)
    except OSError as error:
        raise disk_error(error, site) from None
    shutil.rmtree(old, ignore_errors=True)


def _fingerprint(text: str) -> str:
    if not (match := _DIGEST.fullmatch(text.strip().lower())):
        fix = "the coordinator's `fedllm provision` prints it: `sha256:` and 64 characters 0-9, a-f"
        raise ConfigError("BAD_VALUE", f"{text[:80]!r} is not a fingerprint", where="--authority", fix=fix)
    return f"sha256:{match[2]}"


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES + 1)
    except OSError as error:
        fix = "give the path of the kit that the coordinator sent"
        raise ConfigError("FILE_NOT_FOUND", f"cannot be read: {error.strerror}", where=str(path), fix=fix) from None


def _refused(what: str, where: str) -> IdentityError:
    fix = "nothing was written; ask the coordinator for the newest kit of this site"
    return IdentityError("KIT_REFUSED", what, where=where, fix=fix)
