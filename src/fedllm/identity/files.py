"""Where identities lie: the folders of a site and of the coordinator, and writes that leave no half file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import ResourceError

KEY_FILE = "key.pem"
REQUEST_FILE = "request.csr"
KIT_FOLDER = "kit"
PIN_FILE = "authority.pin"
SERVER = "server"
ADMIN = "admin"


def site_folder(party_file: Path, name: str) -> Path:
    """Return the folder of a site: `site-NAME` beside its party file.

    Args:
        party_file: The site's `party.yaml`.
        name: The party's name.
    """
    return party_file.parent / f"site-{name}"


@dataclass(frozen=True)
class CoordinatorFolder:
    """What the coordinator keeps, below one folder beside `project.yaml`."""

    root: Path

    @classmethod
    def beside(cls, project_file: Path) -> CoordinatorFolder:
        """Return the folder that belongs to a project file.

        Args:
            project_file: The `project.yaml`.
        """
        return cls(project_file.parent / "coordinator")

    @property
    def authority(self) -> Path:
        """The authority's key and certificate, and every certificate that it issued."""
        return self.root / "authority"

    @property
    def requests(self) -> Path:
        """`NAME.csr` of each party."""
        return self.root / "requests"

    @property
    def kits(self) -> Path:
        """`NAME.zip` for each party."""
        return self.root / "kits"

    @property
    def site(self) -> Path:
        """The server's own site folder."""
        return self.root / "site"

    @property
    def admin(self) -> Path:
        """The site folder of the identity that submits jobs."""
        return self.root / "admin"


def make_private(folder: Path) -> Path:
    """Return a folder that only its owner can enter if it had to be made.

    Args:
        folder: The folder; an existing one keeps its mode.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(error, folder) from None
    return folder


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is either the old one or the new one.

    Args:
        path: The file.
        data: Its content.

    Raises:
        ResourceError: `DISK_FULL`; the old file is untouched.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise not_written(error, path) from None


def sync_folder(folder: Path) -> None:
    """Make new names in a folder durable.

    Args:
        folder: The folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def not_written(error: OSError, path: Path) -> ResourceError:
    """Return the error to raise when a file or folder cannot be written.

    Args:
        error: What the system said.
        path: The file or folder.
    """
    fix = "free some space, or make the folder writable; then run the same command again"
    return ResourceError("DISK_FULL", f"cannot write: {error.strerror}", where=str(path), fix=fix)
