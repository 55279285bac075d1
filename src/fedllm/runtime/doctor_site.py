"""Look over a site, or a coordinator: kit, certificates, clock, the way to the server, and what a job needs there."""

from __future__ import annotations

import datetime
import hashlib
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from fedllm.errors import ConfigError, FedllmError, IdentityError, PolicyError
from fedllm.identity.authority import open_authority
from fedllm.identity.certificates import read_certificate
from fedllm.identity.files import KEY_FILE, KIT_FOLDER, CoordinatorFolder, site_folder
from fedllm.identity.keys import load_key
from fedllm.identity.kit import Kit, days_left, installed_manifest, open_kit, read_folder
from fedllm.job.job import Job, LocatedParty
from fedllm.job.loading import load_model
from fedllm.job.party import Party
from fedllm.job.project import Project
from fedllm.runs.audit_log import AUDIT_FILE, read_log
from fedllm.runs.audit_verify import verify_log
from fedllm.runs.control import SUPERVISOR_LOCK, is_held
from fedllm.runtime.doctor import Finding, engine
from fedllm.runtime.reach import reach

_WARN_DAYS = 30
# Certificates allow for clocks a day apart; a kit that was signed in the future shows a clock that is behind.
_SKEW_S = 120.0


def examine_party(party_file: Path, *, site: Path | None = None) -> list[Finding]:
    """Return what was found at a party's site.

    Args:
        party_file: The site's own file.
        site: The site's folder; by default `site-NAME` beside the file.
    """
    try:
        party, _ = load_model(Party, party_file, overrides=[])
    except ConfigError as error:
        return [faulty("party file", each) for each in (error, *error.also)]
    folder = site_folder(party_file, party.name) if site is None else site
    found = [Finding("party file", "ok", f"{party_file}, party {party.name}"), engine(), *_device(party)]
    kit, findings = _kit(folder, party.name)
    found += [*findings, *_audit(folder)]
    if kit is not None:
        found += [_clock(kit, folder), *reach(kit)]
    return found


def examine_project(project_file: Path) -> list[Finding]:
    """Return what was found at a coordinator.

    Args:
        project_file: The project's file.
    """
    try:
        project = Project.from_yaml(project_file)
    except ConfigError as error:
        return [faulty("project file", each) for each in (error, *error.also)]
    folder = CoordinatorFolder.beside(project_file.resolve())
    found = [Finding("project file", "ok", f"{project_file}, project {project.name}"), engine()]
    found.append(_tried("authority", lambda: open_authority(folder.authority, project=project.name).fingerprint))
    kit, findings = _kit(folder.site, "server")
    found += [*findings, *_kit(folder.admin, "admin")[1], *_audit(folder.site)]
    if kit is not None:
        found += [*_roster(project, kit, project_file), _clock(kit, folder.site)]
    return [*found, _listens(project, folder.site / "state" / SUPERVISOR_LOCK), _address(project)]


def faulty(name: str, error: FedllmError) -> Finding:
    """Return an error as a finding.

    Args:
        name: What was looked at.
        error: What was found.
    """
    place = f"{error.where}: " if error.where else ""
    return Finding(name, "fault", f"[{error.code}] {place}{error.what}", error.fix)


def _tried(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", look())
    except FedllmError as error:
        return faulty(name, error)


def _device(party: Party) -> Iterator[Finding]:
    import torch

    if party.device == "cpu":
        return
    number = torch.device(party.device).index or 0
    if number < torch.cuda.device_count():
        yield Finding("device", "ok", torch.cuda.get_device_name(number))
    else:
        what = f"party.yaml names {party.device}, and this machine has {torch.cuda.device_count()} CUDA devices"
        yield Finding("device", "fault", what, "set `device: cpu`, or install torch for CUDA and its driver")


def _kit(site: Path, name: str) -> tuple[Kit | None, list[Finding]]:
    """Return a site's kit if it is whole, and what was found out about it, each fault by itself."""
    key = _tried(f"key of {name}", lambda: f"{load_key(site / KEY_FILE).key_size} bits, its owner's alone")
    try:
        kit = open_kit(site)
    except IdentityError as error:
        found = [faulty(f"kit of {name}", error), *_damaged(site, name, error), *_expired(site, name, error)]
        # The key's own fault is what `open_kit` stopped at.
        return None, found if key.detail == found[0].detail else [*found, key]
    if kit.name != name:
        what = f"it is the kit of `{kit.name}`"
        return None, [Finding(f"kit of {name}", "fault", what, "install the kit of this party"), key]
    detail = f"project {kit.project}, every file as it was signed, {len(list(kit.roster))} on the roster"
    return kit, [Finding(f"kit of {name}", "ok", detail), key, _days(kit)]


def _damaged(site: Path, name: str, first: IdentityError) -> Iterator[Finding]:
    """Yield a finding for each further file that differs; the kit's own list of files may be what was changed."""
    manifest = installed_manifest(site)
    if first.code != "KIT_DAMAGED" or manifest is None:
        return
    with suppress(IdentityError):
        files = read_folder(site / KIT_FOLDER)
        for path, digest in manifest.files.items():
            there = files.get(path)
            if there is not None and f"sha256:{hashlib.sha256(there).hexdigest()}" == digest:
                continue
            if not first.where.endswith(f"/{path}"):
                what = f"{site / KIT_FOLDER / path}: {'is missing' if there is None else 'was changed'}"
                yield Finding(f"kit of {name}", "fault", what, first.fix)


def _expired(site: Path, name: str, first: IdentityError) -> Iterator[Finding]:
    """Yield a finding where the certificate is over, though the kit has a fault that comes before that."""
    if first.code == "CERT_EXPIRED":
        return
    with suppress(IdentityError, OSError):
        path = site / KIT_FOLDER / "cert.pem"
        end = read_certificate(path.read_bytes(), where=str(path)).not_valid_after_utc
        if end < datetime.datetime.now(datetime.UTC):
            yield Finding(f"certificate of {name}", "fault", f"it expired on {end:%Y-%m-%d}", first.fix)


def _days(kit: Kit) -> Finding:
    left = days_left(kit)
    detail = f"valid until {kit.expires:%Y-%m-%d}, {left} days left"
    if left >= _WARN_DAYS:
        return Finding(f"certificate of {kit.name}", "ok", detail)
    fix = "at the coordinator `fedllm provision project.yaml`; then every party installs its new kit"
    return Finding(f"certificate of {kit.name}", "warn", detail, fix)


def _audit(site: Path) -> Iterator[Finding]:
    log = site / AUDIT_FILE
    if not log.exists():
        return
    problems = verify_log(log)
    if problems:
        first = problems[0]
        what = f"[AUDIT_BROKEN] line {first.line}: {first.what}" if first.line else f"[AUDIT_BROKEN] {first.what}"
        yield Finding("audit log", "fault", what, f"`fedllm audit-log verify {log}`; a person has to look at it")
    else:
        yield Finding("audit log", "ok", f"{log}, its chain is whole")


def _clock(kit: Kit, site: Path) -> Finding:
    now, fix = datetime.datetime.now(datetime.UTC), "set this machine's clock: `timedatectl set-ntp true`"
    behind = (kit.issued - now).total_seconds()
    if behind > _SKEW_S:
        what = (
            f"at least {_span(behind)} behind the coordinator's: the kit was signed at {kit.issued:%Y-%m-%d %H:%M} UTC"
        )
        return Finding("clock", "fault", what, fix)
    if (back := (_last_note(site) - now).total_seconds()) > _SKEW_S:
        what = f"at least {_span(back)} behind what it was when this site last wrote its audit log"
        return Finding("clock", "fault", what, fix)
    synced = _synchronised()
    if synced is False:
        return Finding("clock", "warn", "not kept right by a time service; drift is not noticed", fix)
    said = "kept right by a time service" if synced else "whether a time service keeps it right is not known here"
    return Finding("clock", "ok", f"plausible, {said}; it is not compared with the server's, since TLS tells no time")


def _last_note(site: Path) -> datetime.datetime:
    last = datetime.datetime.fromtimestamp(0, datetime.UTC)
    if (site / AUDIT_FILE).exists():
        for _, _, entry in read_log(site / AUDIT_FILE):
            if entry is not None:
                last = max(last, datetime.datetime.fromisoformat(entry.time))
    return last


def _synchronised() -> bool | None:
    command = ["timedatectl", "show", "--property=NTPSynchronized", "--value"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"yes": True, "no": False}.get(done.stdout.strip())


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"


def _roster(project: Project, kit: Kit, project_file: Path) -> Iterator[Finding]:
    fix = f"`fedllm provision {project_file}`; then every party installs its new kit"
    if (kit.host, kit.port) != (project.server.host, project.server.port):
        what = f"project.yaml names {project.server.host}:{project.server.port}, the kits {kit.host}:{kit.port}"
        yield Finding("address", "fault", what, fix)
    missing = [party for party in project.parties if party not in kit.roster]
    gone = [name for name in kit.roster if name not in (*project.parties, "server")]
    if gone:
        yield Finding("roster", "fault", f"still on it, and in project.yaml no more: {', '.join(gone)}", fix)
    if missing:
        ask = f"ask them for `fedllm request party.yaml`; then `fedllm provision {project_file} --request FILE`"
        yield Finding("roster", "warn", f"not on it yet: {', '.join(missing)}", ask)
    elif not gone:
        yield Finding("roster", "ok", f"all of {', '.join(project.parties)}")


def _listens(project: Project, lock: Path) -> Finding:
    port = project.server.port
    if is_held(lock):
        return Finding("port", "ok", f"`fedllm serve` runs here, on port {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except PermissionError:
            fix = "name a port above 1023 in project.yaml, provision again, and send new kits"
            return Finding("port", "fault", f"this user may not listen on port {port}", fix)
        except OSError as error:
            fix = f"end that process{_holder(port)}; or name another port in project.yaml, and provision again"
            return Finding("port", "fault", f"port {port} cannot be used: {error.strerror}", fix)
    return Finding("port", "ok", f"port {port} is free")


def _holder(port: int) -> str:
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and getattr(connection.laddr, "port", None) == port:
                return f" ({psutil.Process(connection.pid).name()}, process {connection.pid})"
    return ""


def _address(project: Project) -> Finding:
    host = project.server.host
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, project.server.port)}
    except OSError:
        fix = "mend the name service, or name an IP address in project.yaml, and provision again"
        return Finding("server name", "warn", f"this machine does not know the name {host}", fix)
    if all(address.startswith("127.") or address == "::1" for address in addresses):
        what = f"{host} is this machine itself: no other machine can connect to it"
        return Finding("server name", "warn", what, "for parties on other machines name an address that they can reach")
    return Finding("server name", "ok", f"{host} is {', '.join(sorted(addresses))}")


def examine_job(job: Job, party_file: Path, *, site: Path | None = None) -> list[Finding]:
    """Return what a job needs at a site: data, limits, base model, memory, approval.

    Args:
        job: The job.
        party_file: The site's own file.
        site: The site's folder; by default `site-NAME` beside the file.
    """
    from fedllm.runtime.site import awaits_package
    from fedllm.runtime.validate import validate

    party, _ = load_model(Party, party_file, overrides=[])
    located = LocatedParty(party=party, base_dir=party_file.resolve().parent)
    if awaits_package(job, located):
        what = f"the base model is still to come from {job.sender}, with the run"
        return [
            Finding("package", "ok", what),
            *_approved(job, party_file, party, site or site_folder(party_file, party.name)),
        ]
    try:
        facts = validate(job, [located])
    except FedllmError as error:
        return [faulty("job", each) for each in (error, *error.also)]
    found = [Finding("job", "ok", f"valid here, digest {facts.digests['job']}")]
    for name in ("base", "tokenizer", "template"):
        found.append(Finding(f"{name} digest", "ok", f"{facts.digests[name]}, which all sites must have"))
    found.append(_model_memory(job, sum(weight.numel() for weight in facts.skeleton.model.parameters())))
    return [*found, *_approved(job, party_file, party, site or site_folder(party_file, party.name))]


def _approved(job: Job, party_file: Path, party: Party, folder: Path) -> list[Finding]:
    from fedllm.job.approval import admit

    with suppress(IdentityError):
        kit = open_kit(folder)
        try:
            admit(job, party, folder=folder, verify=kit.roster.verify, project=kit.project)
            return [Finding("approval", "ok", "the job may run here")]
        except PolicyError as error:
            fix = f"`fedllm approve JOB --party {party_file}`"
            return [Finding("approval", "warn", f"[{error.code}] {error.what}", fix)]
    return []


def _model_memory(job: Job, num_parameters: int) -> Finding:
    weights = num_parameters * (2 if job.model.dtype == "bfloat16" else 4)
    free = psutil.virtual_memory().available
    detail = f"{weights / 1e9:.2f} GB of weights in {job.model.dtype}, {free / 1e9:.1f} GB available"
    fix = "a machine with more memory, a smaller base model, or `model.dtype: bfloat16`"
    if weights > free:
        return Finding("model memory", "fault", detail, fix)
    # Activations and gradients come on top; `fedllm plan` measures them.
    return Finding(
        "model memory", "warn" if 1.5 * weights > free else "ok", detail, fix if 1.5 * weights > free else ""
    )


def examine_submission(job: Job, project_file: Path) -> list[Finding]:
    """Return what a job needs at the coordinator: its parties, and the config of its base model.

    Args:
        job: The job.
        project_file: The project's file.
    """
    from fedllm.models.load import find_base

    project = Project.from_yaml(project_file)
    found = [Finding("base model", "ok", f"its config comes from {job.sender}, with the run")] if job.sender else []
    found = found or [_tried("base model", lambda: str(find_base(job.model, base_dir=job.base_dir)))]
    if strangers := [party for party in job.parties if party not in project.parties]:
        what = f"no party of the project: {', '.join(strangers)}"
        found.append(Finding("parties", "fault", what, f"add them to {project_file} and provision, or change the job"))
    else:
        found.append(Finding("parties", "ok", ", ".join(job.parties)))
    disk = shutil.disk_usage(project_file.resolve().parent).free
    found.append(Finding("job", "ok", f"digest {job.digest}; {disk / 1e9:.1f} GB free for its runs"))
    return found
