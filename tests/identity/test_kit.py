"""A kit is verified whole at every start: a changed bit, a wrong certificate or a wrong date, and nothing starts."""

from __future__ import annotations

import dataclasses
import datetime
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from identities import PROJECT, Keys, Trial, pem_of, put_key, self_signed, weak_key

from fedllm.errors import ExitCode, IdentityError, PayloadError
from fedllm.identity import keys as keys_module
from fedllm.identity import kit as kit_module
from fedllm.identity.authority import Authority, create_authority
from fedllm.identity.kit import days_left, open_kit
from fedllm.identity.requests import Request
from fedllm.identity.signing import Roster, Signer
from fedllm.job.party import NAME_PATTERN

KIT_FILES = [
    "kit/kit.json",
    "kit/kit.sig",
    "kit/ca.pem",
    "kit/cert.pem",
    "kit/roster/north.pem",
    "kit/roster/east.pem",
    "kit/roster/server.pem",
]


def refused(site: Path, *, now: datetime.datetime | None = None) -> IdentityError:
    with pytest.raises(IdentityError) as caught:
        open_kit(site, now=now)
    assert caught.value.exit_code == ExitCode.IDENTITY and caught.value.fix
    return caught.value


def opens(site: Path) -> bool:
    try:
        open_kit(site)
    except IdentityError:
        return False
    return True


def flips(data: bytes, *, step: int) -> Iterator[bytes]:
    """Yield the data with one bit changed, at many places: the first and last bytes, line ends, and in between."""
    ends = {i for i, byte in enumerate(data) if byte == 0x0A}
    places = sorted({0, 1, len(data) - 2, len(data) - 1} | ends | set(range(0, len(data), step)))
    for count, place in enumerate(places):
        changed = bytearray(data)
        changed[place] ^= 1 << count % 8
        yield bytes(changed)


def test_a_kit_tells_who_is_who(provisioned: Trial) -> None:
    kit = open_kit(provisioned.north)
    assert (kit.project, kit.name, kit.kind, kit.host, kit.port) == ("trial", "north", "party", "fl.example.org", 8002)
    assert sorted(kit.roster) == ["east", "north", "server"]
    assert kit.authority == provisioned.authority.fingerprint
    assert [path.read_bytes()[:10] for path in (kit.ca, kit.cert, kit.key)] == [b"-----BEGIN"] * 3


def test_the_coordinator_s_own_sites_have_kits(provisioned: Trial) -> None:
    server, admin = open_kit(provisioned.coordinator.site), open_kit(provisioned.coordinator.admin)
    assert (server.kind, server.name, admin.kind, admin.name) == ("server", "server", "admin", "admin")
    assert sorted(admin.roster) == sorted(server.roster) == ["east", "north", "server"]


def test_names_in_kits_are_those_of_party_files() -> None:
    assert kit_module._NAME == NAME_PATTERN


@pytest.mark.parametrize("name", KIT_FILES)
def test_one_changed_bit_in_any_file_of_a_kit_is_refused_and_named(trial: Trial, name: str) -> None:
    path = trial.north / name
    good = path.read_bytes()
    for changed in flips(good, step=40):
        path.write_bytes(changed)
        error = refused(trial.north)
        assert error.code == "KIT_DAMAGED"
        # The manifest and its signature accuse each other; every other file is named alone.
        assert Path(name).name in str(error)
    path.write_bytes(good)
    assert opens(trial.north)


def test_one_changed_bit_in_the_key_is_refused(trial: Trial) -> None:
    path = trial.north / "key.pem"
    good = path.read_bytes()
    for changed in flips(good, step=9):
        path.write_bytes(changed)
        error = refused(trial.north)
        assert error.code in ("BAD_KEY", "CERT_REFUSED") and error.where == str(path)
    path.write_bytes(good)
    assert opens(trial.north)


def test_one_changed_bit_in_the_pinned_fingerprint_is_refused(trial: Trial) -> None:
    path = trial.north / "authority.pin"
    good = path.read_bytes()
    for changed in flips(good, step=3):
        path.write_bytes(changed)
        assert refused(trial.north).code in ("KIT_DAMAGED", "AUTHORITY_CHANGED")
    path.write_bytes(good)
    assert opens(trial.north)


def test_without_digests_a_changed_bit_would_pass(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trial.north / "kit/roster/east.pem"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    assert not opens(trial.north)
    monkeypatch.setattr(kit_module, "_check_digests", lambda *_: None)
    assert opens(trial.north)


def test_without_one_spelling_of_a_key_a_changed_bit_would_pass(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trial.north / "key.pem"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    assert not opens(trial.north)
    monkeypatch.setattr(keys_module, "_plain_pem", lambda _: path.read_bytes())
    assert opens(trial.north)


@pytest.mark.parametrize("name", KIT_FILES)
def test_a_missing_file_is_refused_and_named(trial: Trial, name: str) -> None:
    (trial.north / name).unlink()
    error = refused(trial.north)
    assert error.code == "KIT_DAMAGED" and Path(name).name in error.where


@pytest.mark.parametrize("name", KIT_FILES)
def test_an_empty_file_is_refused(trial: Trial, name: str) -> None:
    (trial.north / name).write_bytes(b"")
    assert refused(trial.north).code == "KIT_DAMAGED"


@pytest.mark.parametrize("name", ["start.sh", "roster/west.pem", "roster/notes.txt", "kit.json.bak"])
def test_an_added_file_is_refused_and_named(trial: Trial, name: str) -> None:
    (trial.north / "kit" / name).write_bytes((trial.north / "kit/roster/east.pem").read_bytes())
    error = refused(trial.north)
    assert error.code == "KIT_DAMAGED" and Path(name).name in error.where and "added" in error.what


def test_what_is_no_plain_file_is_refused(trial: Trial) -> None:
    east = trial.north / "kit/roster/east.pem"
    shutil.copy(east, trial.root / "copy.pem")
    east.unlink()
    east.symlink_to(trial.root / "copy.pem")
    assert refused(trial.north).code == "KIT_DAMAGED"
    east.unlink()
    shutil.copy(trial.root / "copy.pem", east)
    assert opens(trial.north)
    (trial.north / "kit/more").mkdir()
    assert refused(trial.north).code == "KIT_DAMAGED"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660])
def test_a_key_that_others_can_read_keeps_the_site_from_starting(trial: Trial, mode: int) -> None:
    (trial.north / "key.pem").chmod(mode)
    assert refused(trial.north).code == "KEY_EXPOSED"


def test_a_site_without_kit_key_or_pin_says_what_to_do(trial: Trial) -> None:
    (trial.north / "authority.pin").rename(trial.north / "pin")
    assert refused(trial.north).code == "AUTHORITY_UNCONFIRMED"
    (trial.north / "pin").rename(trial.north / "authority.pin")
    (trial.north / "key.pem").unlink()
    assert "fedllm request" in refused(trial.north).fix
    shutil.rmtree(trial.north / "kit")
    error = refused(trial.north)
    assert error.code == "KIT_MISSING" and "fedllm install" in error.fix


def test_another_site_s_key_is_refused(trial: Trial) -> None:
    shutil.copy(trial.root / "east/site-east/key.pem", trial.north / "key.pem")
    error = refused(trial.north)
    assert error.code == "CERT_REFUSED" and error.where.endswith("key.pem")


@pytest.fixture
def rogue(keys: Keys, tmp_path: Path) -> Authority:
    """Another authority that calls itself the same."""
    return create_authority(tmp_path / "rogue", project=PROJECT.name, key=keys("rogue"))


def request(keys: Keys, name: str, key: str | None = None) -> Request:
    return Request(name, keys(key or name).public_key(), b"")


def test_a_kit_from_another_authority_is_refused_unless_it_is_pinned(
    trial: Trial, rogue: Authority, keys: Keys
) -> None:
    members = {name: rogue.issue(request(keys, name), kind="party") for name in ("north", "east", "server")}
    content = dataclasses.replace(trial.content(), certificate=members["north"], roster=members)
    trial.plant(content, rogue)
    error = refused(trial.north)
    assert error.code == "AUTHORITY_CHANGED" and rogue.fingerprint in error.what
    # The pin alone tells the two apart.
    (trial.north / "authority.pin").write_text(f"{rogue.fingerprint}\n")
    assert opens(trial.north)


def test_a_certificate_that_does_not_prove_who_one_is_is_refused(trial: Trial, rogue: Authority, keys: Keys) -> None:
    content, authority = trial.content(), trial.authority
    sub = dataclasses.replace(authority, certificate=self_signed(keys("north"), "north"))
    cases = {
        "another authority": rogue.issue(request(keys, "north"), kind="party"),
        "itself": pem_of(self_signed(keys("north"), "north")),
        "another name": authority.issue(request(keys, "nort", "north"), kind="party"),
        "an authority": authority.pem,
        "no authority at all": sub.issue(request(keys, "north"), kind="party"),
    }
    for name, certificate in cases.items():
        roster = {**content.roster, "north": certificate}
        trial.plant(dataclasses.replace(content, certificate=certificate, roster=roster))
        assert refused(trial.north).code == "CERT_REFUSED", name
        trial.plant(dataclasses.replace(content, roster=roster))
        assert refused(trial.north).code == "CERT_REFUSED", f"{name}, on the roster"
    trial.plant(content)
    assert opens(trial.north)


def test_without_the_check_of_certificates_another_authority_s_would_pass(
    trial: Trial, rogue: Authority, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = rogue.issue(request(keys, "north"), kind="party")
    roster = {**trial.content().roster, "north": certificate}
    trial.plant(dataclasses.replace(trial.content(), certificate=certificate, roster=roster))
    assert not opens(trial.north)
    monkeypatch.setattr(kit_module, "check_holder", lambda *_, **__: None)
    assert opens(trial.north)


def test_a_weak_key_is_refused_in_the_site_and_on_the_roster(trial: Trial) -> None:
    weak, content = weak_key(), trial.content()
    certificate = trial.authority.issue(Request("north", weak.public_key(), b""), kind="party")
    trial.plant(dataclasses.replace(content, roster={**content.roster, "north": certificate}))
    assert refused(trial.north).code == "WEAK_KEY"
    trial.plant(content)
    (trial.north / "key.pem").write_bytes(
        weak.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    assert refused(trial.north).code == "WEAK_KEY"


def test_who_is_not_on_the_roster_cannot_start(trial: Trial) -> None:
    content = trial.content()
    for name in ("north", "server"):
        trial.plant(dataclasses.replace(content, roster={k: v for k, v in content.roster.items() if k != name}))
        error = refused(trial.north)
        assert error.code == "KIT_DAMAGED" and "roster" in error.what


def test_a_name_on_the_roster_with_another_s_key_is_refused(trial: Trial, keys: Keys) -> None:
    content = trial.content()
    stolen = trial.authority.issue(request(keys, "east", "north"), kind="party")
    trial.plant(dataclasses.replace(content, roster={**content.roster, "east": stolen}))
    error = refused(trial.north)
    assert error.code == "KIT_DAMAGED" and "same key" in error.what


def test_a_certificate_that_the_roster_does_not_name_is_refused(trial: Trial, keys: Keys) -> None:
    another = trial.authority.issue(request(keys, "north"), kind="party")
    trial.plant(dataclasses.replace(trial.content(), certificate=another))
    error = refused(trial.north)
    assert error.code == "KIT_DAMAGED" and error.where.endswith("cert.pem")


def test_a_party_s_kit_cannot_be_called_the_server_s(trial: Trial) -> None:
    trial.plant(dataclasses.replace(trial.content(), kind="server"))
    assert refused(trial.north).code == "KIT_DAMAGED"


def test_a_kit_of_a_later_layout_is_told_from_a_damaged_one(trial: Trial) -> None:
    files = trial.files()
    text = files["kit.json"].replace(b'"schema_version": 1', b'"schema_version": 2')
    (trial.north / "kit/kit.json").write_bytes(text)
    (trial.north / "kit/kit.sig").write_bytes(trial.authority.signer.sign(text, purpose="kit"))
    error = refused(trial.north)
    assert error.code == "KIT_REFUSED" and "version of fedllm" in error.what


def test_a_signature_for_something_else_is_none_for_a_kit(trial: Trial) -> None:
    text = trial.files()["kit.json"]
    (trial.north / "kit/kit.sig").write_bytes(trial.authority.signer.sign(text, purpose="approval"))
    assert refused(trial.north).code == "KIT_DAMAGED"


def test_dates_are_checked_at_every_start(trial: Trial) -> None:
    kit = open_kit(trial.north)
    day = datetime.timedelta(days=1)
    assert refused(trial.north, now=kit.expires + day).code == "CERT_EXPIRED"
    assert refused(trial.north, now=kit.issued - 3 * day).code == "CERT_NOT_YET_VALID"
    assert open_kit(trial.north, now=kit.expires - day).name == "north"


def test_an_expired_party_stops_itself_and_an_expired_server_everyone_but_not_another_party(
    trial: Trial, keys: Keys
) -> None:
    content = trial.content()
    for name, code in (("north", "CERT_EXPIRED"), ("server", "CERT_EXPIRED"), ("east", None)):
        over = trial.authority.issue(request(keys, name), kind="party", days=-1)
        own = over if name == "north" else content.certificate
        trial.plant(dataclasses.replace(content, certificate=own, roster={**content.roster, name: over}))
        if code is None:
            assert opens(trial.north)
        else:
            error = refused(trial.north)
            assert error.code == code and name in error.where.replace("cert", name)


def test_days_left_counts_whole_days(provisioned: Trial) -> None:
    kit = open_kit(provisioned.north)
    assert days_left(kit) in (PROJECT.certificate_days - 1, PROJECT.certificate_days)
    assert days_left(kit, now=kit.expires - datetime.timedelta(days=29, hours=5)) == 29
    assert days_left(kit, now=kit.expires + datetime.timedelta(hours=1)) < 0


def test_messages_are_verified_by_the_roster_of_the_kit(provisioned: Trial, keys: Keys) -> None:
    roster: Roster = open_kit(provisioned.coordinator.site).roster
    roster.verify("north", b"round 3", Signer(keys("north")).sign(b"round 3"))
    for name, key in (("north", "east"), ("north", "rogue"), ("west", "north"), ("admin", "admin")):
        with pytest.raises(PayloadError) as caught:
            roster.verify(name, b"round 3", Signer(keys(key)).sign(b"round 3"))
        assert caught.value.code == ("NOT_ON_ROSTER" if name in ("west", "admin") else "BAD_SIGNATURE")


def test_nothing_of_a_key_is_in_any_refusal(trial: Trial) -> None:
    path = trial.north / "key.pem"
    good = path.read_bytes().decode()
    lines = [line for line in good.splitlines() if "-" not in line]
    for changed in flips(good.encode(), step=200):
        path.write_bytes(changed)
        text = str(refused(trial.north))
        assert not any(line[:16] in text for line in lines)


def test_a_kit_is_no_place_for_a_key_of_another_project(trial: Trial, keys: Keys, tmp_path: Path) -> None:
    put_key(keys("west"), tmp_path / "west")
    shutil.copytree(trial.north / "kit", tmp_path / "west" / "kit")
    shutil.copy(trial.north / "authority.pin", tmp_path / "west" / "authority.pin")
    assert refused(tmp_path / "west").code == "CERT_REFUSED"
