"""Keys and a provisioned project, made once: making keys is what takes time."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from identities import PROJECT, Keys, Trial, put_key

from fedllm.identity.authority import create_authority
from fedllm.identity.install import install_kit
from fedllm.identity.keys import MIN_KEY_BITS, new_key
from fedllm.identity.requests import make_request
from fedllm.runtime.provision import provision


@pytest.fixture(scope="session")
def keys() -> Keys:
    """Return a function that gives each name a key of its own, the same one in all tests."""
    made: dict[str, rsa.RSAPrivateKey] = {}

    def of(name: str) -> rsa.RSAPrivateKey:
        if name not in made:
            made[name] = new_key(bits=MIN_KEY_BITS)
        return made[name]

    return of


@pytest.fixture(scope="session")
def provisioned(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """Return a project provisioned by requests; only to be read."""
    trial = Trial(tmp_path_factory.mktemp("trial"))
    folder = trial.coordinator
    create_authority(folder.authority, project=PROJECT.name, key=keys("authority"))
    put_key(keys("server"), folder.site)
    put_key(keys("admin"), folder.admin)
    sites = {name: trial.root / name / f"site-{name}" for name in PROJECT.parties}
    for name, site in sites.items():
        put_key(keys(name), site)
    done = provision(folder, PROJECT, requests=[make_request(site, name) for name, site in sites.items()])
    for name, site in sites.items():
        install_kit(done.kits[name].path, site, authority=done.authority)
    return trial


@pytest.fixture
def trial(provisioned: Trial, tmp_path: Path) -> Trial:
    """Return a project provisioned by requests, for one test to spoil."""
    return provisioned.copy(tmp_path / "trial")
