"""Where identities lie: the folders of a site and of the coordinator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
