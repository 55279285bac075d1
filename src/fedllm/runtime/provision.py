"""Provisioning: requests of the parties -> certificates, the roster, and a start-up kit for each."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cryptography import x509

from fedllm.disk import make_private, write_atomic
from fedllm.errors import ConfigError, IdentityError, nearest
from fedllm.identity.authority import (
    AUTHORITY_FILE,
    AUTHORITY_KEY_FILE,
    Authority,
    Kind,
    alternative_names,
    create_authority,
)
from fedllm.identity.certificates import Holder, check_dates, check_holder, read_certificate
from fedllm.identity.files import ADMIN, KEY_FILE, KIT_FOLDER, SERVER, CoordinatorFolder
from fedllm.identity.install import install_files, install_kit, pack, read_kit
from fedllm.identity.keys import check_public_key, key_fingerprint, make_missing_keys
from fedllm.identity.kit import (
    MANIFEST,
    Address,
    Content,
    Manifest,
    installed_manifest,
    read_folder,
    signed_files,
    verify_files,
)
from fedllm.identity.requests import Request, load_request, make_request
from fedllm.job.project import Project

# A certificate with less time left than this is renewed with the next kits.
_RENEW_DAYS = 30


@dataclass(frozen=True)
class PartyKit:
    """One party's kit at the coordinator."""

    path: Path
    key: str
    expires: datetime.datetime
    is_new: bool


@dataclass(frozen=True)
class Provisioned:
    """What provisioning did."""

    authority: str
    authority_is_new: bool
    kits: dict[str, PartyKit]
    missing: tuple[str, ...]
    roster_changed: bool

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON value."""
        kits = {
            name: {"path": str(kit.path), "key": kit.key, "expires": kit.expires.isoformat(), "is_new": kit.is_new}
            for name, kit in self.kits.items()
        }
        return {
            "authority": self.authority,
            "authority_is_new": self.authority_is_new,
            "kits": kits,
            "missing": list(self.missing),
            "roster_changed": self.roster_changed,
        }


@dataclass(frozen=True)
class _Desk:
    """What every step of one provisioning needs."""

    folder: CoordinatorFolder
    project: Project
    authority: Authority
    issued: datetime.datetime


def provision(
    folder: CoordinatorFolder, project: Project, *, requests: Iterable[Path] = (), replace: Collection[str] = ()
) -> Provisioned:
    """Return what was done: certificates and kits for the server and for every party that sent a request.

    A second call with nothing new changes nothing. No private key of a party is needed or seen.

    Args:
        folder: The coordinator's folder.
        project: Who works together.
        requests: Requests that came in; those in the folder are taken too.
        replace: Parties that may have another key than they were certified for.

    Raises:
        ConfigError: `PARTY_UNKNOWN`: a request, or a name to replace, of nobody in the project.
        IdentityError: A request or the authority is refused; no kit is written.
    """
    for name in replace:
        _check_member(name, project, "--replace")
    found = _load_requests(folder, project, requests)
    is_new = not (folder.authority / AUTHORITY_FILE).exists()
    make_missing_keys(_own_keys(folder))
    authority = create_authority(folder.authority, project=project.name)
    before = installed_manifest(folder.site)
    desk = _Desk(folder, project, authority, _next_date(before))
    asked = found | {
        SERVER: load_request(make_request(folder.site, SERVER), name=SERVER),
        ADMIN: load_request(make_request(folder.admin, ADMIN), name=ADMIN),
    }
    _check_keys(desk, asked, replace)
    for name, request in found.items():
        write_atomic(make_private(folder.requests) / f"{name}.csr", request.pem)
    certificates = {name: _certificate(desk, request) for name, request in asked.items()}
    kits = _write_kits(desk, certificates)
    after = installed_manifest(folder.site)
    return Provisioned(
        authority=authority.fingerprint,
        authority_is_new=is_new,
        kits=kits,
        missing=tuple(name for name in project.parties if name not in kits),
        roster_changed=before is not None and after is not None and before.roster != after.roster,
    )


def provision_all(folder: Path, project: Project, parties: Mapping[str, Path]) -> Provisioned:
    """Return what was done: keys, kits and their installation for server and parties on one machine.

    Only for one machine under one owner: whoever runs it can read every party's key.

    Args:
        folder: The coordinator's folder; made if absent.
        project: Who works together.
        parties: Name of each party of the project -> its site folder; made if absent.

    Raises:
        ConfigError: `PARTY_UNKNOWN`: the parties are not those of the project.
        IdentityError: Something that is there cannot be used, or belongs to another authority.
    """
    if wrong := sorted(set(parties) ^ set(project.parties)):
        fix = "give a site folder for each party of the project, and for no other"
        raise ConfigError("PARTY_UNKNOWN", f"the project and the folders differ in {', '.join(wrong)}", fix=fix)
    root = CoordinatorFolder(folder)
    make_missing_keys([*_own_keys(root), *(site / KEY_FILE for site in parties.values())])
    requests = [make_request(site, name) for name, site in parties.items()]
    # Every key is this machine's own, so a new one needs nobody's word.
    done = provision(root, project, requests=requests, replace=list(parties))
    for name, site in parties.items():
        install_kit(done.kits[name].path, site, authority=done.authority, name=name)
    return done


def _own_keys(folder: CoordinatorFolder) -> list[Path]:
    keys = [folder.site / KEY_FILE, folder.admin / KEY_FILE]
    # Where the authority's certificate is there and its key is lost, a new key would only hide that.
    if not (folder.authority / AUTHORITY_FILE).exists():
        keys.append(folder.authority / AUTHORITY_KEY_FILE)
    return keys


def _load_requests(folder: CoordinatorFolder, project: Project, paths: Iterable[Path]) -> dict[str, Request]:
    came = {}
    for path in paths:
        request = load_request(path)
        _check_member(request.name, project, str(path))
        came[request.name] = request
    stored = {name: folder.requests / f"{name}.csr" for name in project.parties}
    found = {name: load_request(path, name=name) for name, path in stored.items() if path.exists()}
    return found | came


def _check_member(name: str, project: Project, where: str) -> None:
    if name not in project.parties:
        hint = nearest(name[:64], project.parties)
        fix = f"{hint} Or add it to `parties` in project.yaml".strip()
        raise ConfigError("PARTY_UNKNOWN", f"`{name[:64]}` is no party of the project", where=where, fix=fix)


def _next_date(before: Manifest | None) -> datetime.datetime:
    # Sites refuse a kit that is older than theirs: also after this machine's clock was set back, none must be.
    now = datetime.datetime.now(datetime.UTC)
    return now if before is None else max(now, before.issued + datetime.timedelta(microseconds=1))


def _check_keys(desk: _Desk, asked: Mapping[str, Request], replace: Collection[str]) -> None:
    holders: dict[str, str] = {}
    for name, request in asked.items():
        if (other := holders.setdefault(request.fingerprint, name)) != name:
            fix = "each party makes a key of its own with `fedllm request`"
            raise IdentityError("REQUEST_REFUSED", f"it has the same key as `{other}`", where=name, fix=fix)
    for name in set(desk.project.parties) & set(asked) - set(replace):
        issued = _issued(desk, name)
        if issued is not None and issued.public_key() != asked[name].key:
            fix = f"if the party confirms {asked[name].fingerprint} by another way: `--replace {name}`"
            what = "it has another key than the party was certified for"
            raise IdentityError("REQUEST_REFUSED", what, where=name, fix=fix)


def _issued(desk: _Desk, name: str) -> x509.Certificate | None:
    path = _issued_file(desk, name)
    return read_certificate(path.read_bytes(), where=str(path)) if path.exists() else None


def _issued_file(desk: _Desk, name: str) -> Path:
    return desk.folder.authority / "issued" / f"{name}.pem"


def _kind(name: str) -> Kind:
    if name == SERVER:
        return "server"
    return "admin" if name == ADMIN else "party"


def _certificate(desk: _Desk, request: Request) -> bytes:
    """Return the certificate that was issued before, or a new one where that one no longer serves."""
    path = _issued_file(desk, request.name)
    if _still_serves(desk, request):
        return path.read_bytes()
    host = desk.project.server.host if request.name == SERVER else None
    pem = desk.authority.issue(request, kind=_kind(request.name), host=host, days=desk.project.certificate_days)
    make_private(path.parent)
    write_atomic(path, pem)
    return pem


def _still_serves(desk: _Desk, request: Request) -> bool:
    # Certificates for a few days would otherwise be made anew each time.
    margin = datetime.timedelta(days=min(_RENEW_DAYS, desk.project.certificate_days // 3))
    try:
        issued = _issued(desk, request.name)
        if issued is None:
            return False
        check_holder(issued, Holder(desk.authority.certificate, request.name), where=request.name)
        check_dates(issued, where=request.name, now=datetime.datetime.now(datetime.UTC) + margin)
    except IdentityError:
        return False
    if request.name == SERVER and _names_in(issued) != alternative_names(desk.project.server.host):
        return False
    return issued.public_key() == request.key


def _names_in(certificate: x509.Certificate) -> list[x509.GeneralName]:
    return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)


def _write_kits(desk: _Desk, certificates: Mapping[str, bytes]) -> dict[str, PartyKit]:
    folder = desk.folder
    for site, name in ((folder.site, SERVER), (folder.admin, ADMIN)):
        content = _content(desk, name, certificates)
        if not _is_current(partial(read_folder, site / KIT_FOLDER), desk, content):
            files = signed_files(desk.authority, content, issued=desk.issued)
            install_files(files, site, authority=desk.authority.fingerprint, name=name)
    make_private(folder.kits)
    for path in folder.kits.glob("*.zip"):
        # The kit of a party that left the project would only be sent by mistake.
        if path.stem not in desk.project.parties:
            path.unlink()
    return {name: _party_kit(desk, name, certificates) for name in desk.project.parties if name in certificates}


def _party_kit(desk: _Desk, name: str, certificates: Mapping[str, bytes]) -> PartyKit:
    path = desk.folder.kits / f"{name}.zip"
    content = _content(desk, name, certificates)
    is_new = not (path.exists() and _is_current(partial(read_kit, path), desk, content))
    if is_new:
        write_atomic(path, pack(signed_files(desk.authority, content, issued=desk.issued)))
    certificate = read_certificate(certificates[name], where=name)
    key = check_public_key(certificate.public_key(), where=name)
    return PartyKit(path, key_fingerprint(key), certificate.not_valid_after_utc, is_new)


def _content(desk: _Desk, name: str, certificates: Mapping[str, bytes]) -> Content:
    server = desk.project.server
    return Content(
        project=desk.project.name,
        name=name,
        kind=_kind(name),
        server=Address(host=server.host, port=server.port),
        certificate=certificates[name],
        roster={member: pem for member, pem in certificates.items() if member != ADMIN},
    )


def _is_current(read: Callable[[], dict[str, bytes]], desk: _Desk, content: Content) -> bool:
    try:
        files = read()
        verified = verify_files(files, pin=desk.authority.fingerprint, where=content.name)
    except IdentityError:
        return False
    return files[MANIFEST] == signed_files(desk.authority, content, issued=verified.manifest.issued)[MANIFEST]
