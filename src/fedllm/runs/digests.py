"""digests.json: the SHA-256 of every file of a finished run, signed where the run belongs to a site with a key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import SenderRefused
from fedllm.identity.files import KEY_FILE
from fedllm.identity.keys import load_key
from fedllm.identity.kit import installed_manifest
from fedllm.identity.signing import Roster, Signer, is_signed
from fedllm.models.digest import file_digest
from fedllm.runs.folder import run_identity
from fedllm.runs.jsonl import write_json

DIGESTS = "digests.json"
# Locks, what processes tell while they run, and keys, which a site may delete when the run is over.
_PASSING = {".lock", ".supervisor", "control.json", "live.json", "epoch.json", "noise.key", "sum_key.json", DIGESTS}


@dataclass(frozen=True)
class Seal:
    """What digests.json says.

    Args:
        body: What is signed: `run_id`, `job_digest`, and `files`, path -> SHA-256.
        signed_by: Whose key signed it; empty where nobody's did.
        signature: Hex.
        sha256: The digest of digests.json itself: whoever noted it elsewhere knows the run by it.
    """

    body: dict[str, Any]
    signed_by: str
    signature: str
    sha256: str

    @property
    def files(self) -> dict[str, str]:
        """Path from the run folder -> SHA-256."""
        return dict(self.body["files"])

    def is_signed_by(self, roster: Roster) -> bool:
        """Return whether its signature is that of the site that it names.

        Args:
            roster: Of the project.
        """
        try:
            roster.verify(self.signed_by, _signed(self.body), bytes.fromhex(self.signature), purpose="run")
        except SenderRefused:
            return False
        return True


def site_of(run: Path) -> Path | None:
    """Return the folder of the site that a run belongs to, `SITE/state/runs/RUN`; None on a machine of its own.

    Args:
        run: The run folder.
    """
    above = run.resolve().parents
    return above[2] if len(above) > 2 and installed_manifest(above[2]) else None


def covered(run: Path) -> Iterator[str]:
    """Yield the files of a run that stay as they are once it is finished, as paths from its folder, sorted.

    Of a run within the run (`baselines/`) that is its own digests.json.

    Args:
        run: The run folder.
    """
    inner = [path.parent for path in run.rglob("run.json") if path.parent != run]
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        of_inner = any(folder in path.parents for folder in inner)
        if not path.is_file() or "spool" in path.relative_to(run).parts or path.suffix == ".tmp":
            continue
        if (path.name == DIGESTS and path.parent in inner) if of_inner else path.name not in _PASSING:
            yield name


def seal_run(run: Path) -> Seal:
    """Write digests.json over all files of a finished run, and return it.

    Args:
        run: The run folder.

    Raises:
        ConfigError: `RUN_NOT_FOUND`.
        ResourceError: `DISK_FULL`.
        IdentityError: The site's key cannot be used.
    """
    files = {name: file_digest(run / name) for name in covered(run)}
    return _write(run, {**run_identity(run), "files": files})


def renew(run: Path, names: Iterable[str]) -> None:
    """Note the digests of pages that were written again; nothing where the run is not sealed.

    Where the seal was signed and the signature does not hold any more, it stays as it is, so that no change is
    covered up by a new signature.

    Args:
        run: The run folder.
        names: The files that were written just now.

    Raises:
        ResourceError: `DISK_FULL`.
        IdentityError: The site's key cannot be used.
    """
    found = read_seal(run)
    if found is None or not _is_own(run, found):
        return
    there = {name: file_digest(run / name) for name in names if (run / name).is_file()}
    _write(run, {**found.body, "files": found.files | there})


def read_seal(run: Path) -> Seal | None:
    """Return what a run's digests.json says, unverified; None if there is none that can be read.

    Args:
        run: The run folder.
    """
    try:
        data = (run / DIGESTS).read_bytes()
        found = json.loads(data)
        signed_by, signature = str(found.pop("signed_by")), str(found.pop("signature"))
        bytes.fromhex(signature)
        files = found["files"]
        if not all(isinstance(part, str) for pair in files.items() for part in pair):
            return None
        return Seal(found, signed_by, signature, hashlib.sha256(data).hexdigest())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_own(run: Path, found: Seal) -> bool:
    site = site_of(run)
    if not found.signature:
        return site is None
    if site is None:
        return False
    key = load_key(site / KEY_FILE).public_key()
    return is_signed(key, _signed(found.body), bytes.fromhex(found.signature), purpose="run")


def _write(run: Path, body: dict[str, Any]) -> Seal:
    site, signed_by, signature = site_of(run), "", ""
    body = body | {"files": dict(sorted(body["files"].items()))}
    if site is not None and (manifest := installed_manifest(site)):
        signed_by = manifest.name
        signature = Signer(load_key(site / KEY_FILE)).sign(_signed(body), purpose="run").hex()
    write_json(run / DIGESTS, body | {"signed_by": signed_by, "signature": signature})
    found = read_seal(run)
    assert found is not None  # noqa: S101
    return found


def _signed(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
