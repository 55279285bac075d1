"""Provisioning: the coordinator learns no party's key, twice is as once, and nobody is let in under another's name."""

from __future__ import annotations

import base64
import datetime
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from identities import PROJECT, Keys, Trial, put_key

from fedllm.errors import ConfigError, IdentityError
from fedllm.identity.files import CoordinatorFolder
from fedllm.identity.install import install_kit
from fedllm.identity.keys import MIN_KEY_BITS, load_key, new_key
from fedllm.identity.kit import days_left, installed_manifest, open_kit
from fedllm.identity.requests import load_request, make_request
from fedllm.job.project import Project
from fedllm.runtime import provision as provision_module
from fedllm.runtime.provision import Provisioned, provision, provision_all


def project_of(**changes: object) -> Project:
    return Project.model_validate(PROJECT.model_dump() | changes)


def again(trial: Trial, project: Project = PROJECT, **options: object) -> Provisioned:
    return provision(trial.coordinator, project, **options)  # type: ignore[arg-type]


def request_in(trial: Trial, keys: Keys, name: str, key: str | None = None) -> Path:
    """Return a new request under a name, made with a key that has the same name or another."""
    site = trial.root / f"new-{name}-{key or name}"
    put_key(keys(key or name), site)
    return make_request(site, name)


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every file, every member of every archive, and what every base64 block in them says."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        yield str(path), path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    yield f"{path}:{name}", archive.read(name)


def decoded(data: bytes) -> Iterator[bytes]:
    yield data
    for block in re.findall(rb"[A-Za-z0-9+/=\s]{64,}", data):
        letters = re.sub(rb"[\s=]", b"", block)
        # A block may begin in the middle of a group of four.
        for start in range(4):
            part = letters[start : start + (len(letters) - start) // 4 * 4]
            yield base64.b64decode(part)


def secrets_of(key: rsa.RSAPrivateKey) -> list[bytes]:
    numbers = key.private_numbers()
    secret = [numbers.p, numbers.q, numbers.d, numbers.dmp1, numbers.dmq1, numbers.iqmp]
    # From the middle of each number, in both byte orders and as text.
    parts = [number.to_bytes((number.bit_length() + 7) // 8, "big")[8:40] for number in secret]
    return [form for part in parts for form in (part, part[::-1], part.hex().encode(), part.hex().upper().encode())]


def leaks(folder: Path, keys: Keys, names: list[str]) -> list[str]:
    """Return where a secret number of a party's key stands."""
    wanted = [secret for name in names for secret in secrets_of(keys(name))]
    return [
        place for place, data in contents(folder) if any(secret in text for text in decoded(data) for secret in wanted)
    ]


def test_no_party_s_private_key_is_at_the_coordinator_or_in_a_kit(provisioned: Trial, keys: Keys) -> None:
    root = provisioned.coordinator.root
    assert leaks(root, keys, PROJECT.parties) == []
    private = [place for place, data in contents(root) if b"PRIVATE KEY" in data]
    assert sorted(Path(place).relative_to(root).as_posix() for place in private) == [
        "admin/key.pem",
        "authority/ca.key",
        "site/key.pem",
    ]
    # The coordinator's own keys are not in what it sends either.
    assert leaks(provisioned.coordinator.kits, keys, ["server", "admin", "authority"]) == []


def test_a_private_key_at_the_coordinator_would_be_found(provisioned: Trial, keys: Keys, tmp_path: Path) -> None:
    key = keys("north")
    no = serialization.NoEncryption()
    forms = {
        "pem": (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8),
        "der": (serialization.Encoding.DER, serialization.PrivateFormat.PKCS8),
        "old": (serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL),
    }
    for name, (encoding, form) in forms.items():
        data = key.private_bytes(encoding, form, no)
        (tmp_path / name).mkdir()
        (tmp_path / name / "planted.log").write_bytes(b"note " + data)
        with zipfile.ZipFile(tmp_path / name / "planted.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("roster/west.pem", data)
        found = {Path(place).name for place in leaks(tmp_path / name, keys, ["north"])}
        assert found >= {"planted.log", "west.pem"}, name
    (tmp_path / "hex").mkdir()
    (tmp_path / "hex/planted.json").write_text(f'{{"d": "{key.private_numbers().d:x}"}}')
    assert leaks(tmp_path / "hex", keys, ["north"])
    assert leaks(provisioned.north, keys, ["north"]) == [str(provisioned.north / "key.pem")]


def test_twice_is_as_once(trial: Trial) -> None:
    before = state_of(trial.coordinator.root)
    done = again(trial)
    assert state_of(trial.coordinator.root) == before
    assert not done.roster_changed and not done.authority_is_new and done.missing == ()
    assert [kit.is_new for kit in done.kits.values()] == [False, False]
    assert done.authority == trial.authority.fingerprint


def test_a_party_without_a_request_is_waited_for(trial: Trial) -> None:
    done = again(trial, project_of(parties=["north", "east", "west"]))
    assert done.missing == ("west",)
    assert not any(kit.is_new for kit in done.kits.values())


def test_a_new_party_is_on_the_roster_of_everyone_and_keys_stay(trial: Trial, keys: Keys) -> None:
    project = project_of(parties=["north", "east", "west"])
    own = {name: (trial.coordinator.root / name / "key.pem").read_bytes() for name in ("site", "admin")}
    done = again(trial, project, requests=[request_in(trial, keys, "west")])
    assert done.roster_changed and done.missing == ()
    assert [kit.is_new for kit in done.kits.values()] == [True, True, True]
    assert own == {name: (trial.coordinator.root / name / "key.pem").read_bytes() for name in own}
    before = open_kit(trial.north)
    after = install_kit(done.kits["north"].path, trial.north, authority=None)
    assert set(after.roster) - set(before.roster) == {"west"}
    assert after.roster.fingerprint("north") == before.roster.fingerprint("north")
    for site in (trial.coordinator.site, trial.coordinator.admin):
        assert "west" in open_kit(site).roster


def test_a_party_that_left_is_on_nobody_s_roster_and_has_no_kit(trial: Trial) -> None:
    done = again(trial, project_of(parties=["north"]))
    assert done.roster_changed
    assert "east" not in open_kit(trial.coordinator.site).roster
    assert "east" not in install_kit(done.kits["north"].path, trial.north, authority=None).roster
    assert not (trial.coordinator.kits / "east.zip").exists()


def test_a_new_address_goes_into_the_server_s_certificate_and_every_kit(trial: Trial) -> None:
    before = open_kit(trial.coordinator.site)
    done = again(trial, project_of(server={"host": "10.0.0.7", "port": 9000}))
    after = install_kit(done.kits["north"].path, trial.north, authority=None)
    assert (after.host, after.port) == ("10.0.0.7", 9000)
    assert after.roster.fingerprint("server") != before.roster.fingerprint("server")
    assert after.roster.fingerprint("north") == before.roster.fingerprint("north")


def test_a_kit_that_was_lost_or_damaged_is_written_anew(trial: Trial) -> None:
    trial.kit_file.unlink()
    east = trial.coordinator.kits / "east.zip"
    east.write_bytes(east.read_bytes()[:-100])
    (trial.coordinator.site / "kit/cert.pem").write_bytes(b"")
    done = again(trial)
    assert [kit.is_new for kit in done.kits.values()] == [True, True]
    assert open_kit(trial.coordinator.site).name == "server"
    install_kit(trial.kit_file, trial.north, authority=None)


def test_another_key_under_a_known_name_needs_the_coordinator_s_word(trial: Trial, keys: Keys) -> None:
    request = request_in(trial, keys, "north", "thief")
    before = state_of(trial.coordinator.root)
    with pytest.raises(IdentityError) as caught:
        again(trial, requests=[request])
    assert caught.value.code == "REQUEST_REFUSED" and "--replace north" in caught.value.fix
    assert state_of(trial.coordinator.root) == before
    # Nor does it help to put the file where requests are kept.
    shutil.copy(request, trial.coordinator.requests / "north.csr")
    with pytest.raises(IdentityError):
        again(trial)
    done = again(trial, replace=["north"])
    assert done.roster_changed
    site = request.parent
    kit = install_kit(done.kits["north"].path, site, authority=done.authority)
    assert load_key(kit.key).public_key() == keys("thief").public_key()
    with pytest.raises(IdentityError):
        install_kit(done.kits["north"].path, trial.north, authority=None)


def test_one_key_cannot_have_two_names(trial: Trial, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    project = project_of(parties=["north", "east", "west"])
    request = request_in(trial, keys, "west", "north")
    with pytest.raises(IdentityError) as caught:
        again(trial, project, requests=[request])
    assert caught.value.code == "REQUEST_REFUSED" and "same key" in caught.value.what
    monkeypatch.setattr(provision_module, "_check_keys", lambda *_: None)
    with pytest.raises(IdentityError, match="same key"):
        again(trial, project, requests=[request])


def test_who_is_not_in_the_project_gets_no_certificate(trial: Trial, keys: Keys) -> None:
    before = state_of(trial.coordinator.root)
    for name in ("west", "server", "admin"):
        with pytest.raises(ConfigError) as caught:
            again(trial, requests=[request_in(trial, keys, name, "thief")])
        assert caught.value.code == "PARTY_UNKNOWN"
    with pytest.raises(ConfigError):
        again(trial, replace=["west"])
    assert state_of(trial.coordinator.root) == before


def test_a_request_kept_under_another_name_is_refused(trial: Trial) -> None:
    shutil.copy(trial.coordinator.requests / "north.csr", trial.coordinator.requests / "east.csr")
    with pytest.raises(IdentityError) as caught:
        again(trial)
    assert caught.value.code == "REQUEST_REFUSED" and caught.value.where.endswith("east.csr")


def test_certificates_are_renewed_before_they_end_and_keys_stay(trial: Trial) -> None:
    before = open_kit(trial.north)
    request = load_request(trial.coordinator.requests / "north.csr")
    for days, is_renewed in ((40, False), (20, True)):
        soon = trial.authority.issue(request, kind="party", days=days)
        (trial.coordinator.authority / "issued/north.pem").write_bytes(soon)
        done = again(trial)
        issued = (trial.coordinator.authority / "issued/north.pem").read_bytes()
        assert (issued != soon) == is_renewed
    assert done.roster_changed and all(kit.is_new for kit in done.kits.values())
    after = install_kit(done.kits["north"].path, trial.north, authority=None)
    assert after.roster.fingerprint("north") != before.roster.fingerprint("north")
    assert after.roster.certificate("north").public_key() == before.roster.certificate("north").public_key()
    assert days_left(after) > 300


def test_certificates_for_a_few_days_are_not_made_anew_each_time(trial: Trial) -> None:
    project = project_of(certificate_days=3)
    shutil.rmtree(trial.coordinator.authority / "issued")
    again(trial, project)
    assert not again(trial, project).roster_changed


def test_kits_are_in_order_also_when_the_clock_is_set_back(trial: Trial, keys: Keys) -> None:
    last = installed_manifest(trial.coordinator.site)
    assert last is not None
    ahead = last.issued + datetime.timedelta(days=1)
    shift = last.model_copy(update={"issued": ahead})
    assert provision_module._next_date(shift) > ahead
    assert provision_module._next_date(None) < ahead


def test_a_lost_key_of_the_authority_is_not_replaced(trial: Trial) -> None:
    (trial.coordinator.authority / "ca.key").unlink()
    with pytest.raises(IdentityError) as caught:
        again(trial)
    assert caught.value.code == "AUTHORITY_MISSING"
    assert not (trial.coordinator.authority / "ca.key").exists()


def test_an_exposed_key_of_the_server_is_refused(trial: Trial) -> None:
    (trial.coordinator.site / "key.pem").chmod(0o644)
    with pytest.raises(IdentityError) as caught:
        again(trial)
    assert caught.value.code == "KEY_EXPOSED"


def test_one_machine_is_provisioned_in_one_call_and_again(
    trial: Trial, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_key, "__kwdefaults__", {"bits": MIN_KEY_BITS})
    folder, project = trial.root / "one", project_of(server={"host": "127.0.0.1", "port": 8002})
    root = CoordinatorFolder(folder)
    sites = {name: folder / f"site-{name}" for name in project.parties}
    for name, site in {**sites, "server": root.site, "admin": root.admin}.items():
        put_key(keys(name), site)
    first = provision_all(folder, project, sites)
    assert first.authority_is_new and first.missing == ()
    before = state_of(folder)
    assert not provision_all(folder, project, sites).roster_changed
    assert state_of(folder) == before
    shutil.rmtree(sites["north"])
    assert provision_all(folder, project, sites).roster_changed
    for site in (*sites.values(), root.site, root.admin):
        assert open_kit(site).host == "127.0.0.1"
    with pytest.raises(ConfigError):
        provision_all(folder, project, {"north": sites["north"]})
