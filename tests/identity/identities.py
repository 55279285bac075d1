"""Keys, certificates and a provisioned project for the tests of identities."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from fedllm.identity.authority import Authority, open_authority
from fedllm.identity.files import KIT_FOLDER, CoordinatorFolder
from fedllm.identity.install import read_kit
from fedllm.identity.keys import save_key
from fedllm.identity.kit import Address, Content, Manifest, signed_files
from fedllm.job.project import Project

Keys = Callable[[str], rsa.RSAPrivateKey]


def weak_key() -> rsa.RSAPrivateKey:
    """Return a key that is too short."""
    return rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505


def self_signed(key: rsa.RSAPrivateKey, name: str) -> x509.Certificate:
    """Return a certificate that vouches for itself."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    return builder.sign(key, hashes.SHA256())


PROJECT = Project.model_validate(
    {"name": "trial", "server": {"host": "fl.example.org", "port": 8002}, "parties": ["north", "east"]}
)


@dataclass(frozen=True)
class Trial:
    """A project of two parties, each on what stands for its own machine."""

    root: Path

    @property
    def coordinator(self) -> CoordinatorFolder:
        return CoordinatorFolder(self.root / "coordinator")

    @property
    def authority(self) -> Authority:
        return open_authority(self.coordinator.authority, project=PROJECT.name)

    @property
    def north(self) -> Path:
        return self.root / "north" / "site-north"

    @property
    def kit_file(self) -> Path:
        return self.coordinator.kits / "north.zip"

    def copy(self, folder: Path) -> Trial:
        shutil.copytree(self.root, folder, dirs_exist_ok=True)
        return Trial(folder)

    def files(self) -> dict[str, bytes]:
        """Return the files of the kit of north."""
        return read_kit(self.kit_file)

    def content(self) -> Content:
        """Return what the kit of north says."""
        files = self.files()
        server = Address(host=PROJECT.server.host, port=PROJECT.server.port)
        roster = {name: files[f"roster/{name}.pem"] for name in ("north", "east", "server")}
        return Content(PROJECT.name, "north", "party", server, files["cert.pem"], roster)

    def plant(self, content: Content, authority: Authority | None = None) -> None:
        """Put a kit into the site of north without the checks of an installation."""
        issued = Manifest.model_validate_json(self.files()["kit.json"]).issued
        files = signed_files(authority or self.authority, content, issued=issued)
        shutil.rmtree(self.north / KIT_FOLDER)
        for path, data in files.items():
            (self.north / KIT_FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
            (self.north / KIT_FOLDER / path).write_bytes(data)


def put_key(key: rsa.RSAPrivateKey, site: Path) -> None:
    """Give a site a key that was made before."""
    site.mkdir(parents=True, exist_ok=True)
    save_key(key, site / "key.pem")


def pem_of(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
