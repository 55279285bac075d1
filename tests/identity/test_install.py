"""Kits as archives: a hostile one writes nothing anywhere, and only a confirmed authority's kit is installed."""

from __future__ import annotations

import datetime
import io
import stat
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from identities import PROJECT, Keys, Trial, put_key

from fedllm.errors import ConfigError, IdentityError, ResourceError
from fedllm.identity import install as install_module
from fedllm.identity.authority import Authority, create_authority
from fedllm.identity.install import build_kit, install_kit, kit_authority, pack, unpack
from fedllm.identity.kit import Content, Verified, open_kit


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def fresh(trial: Trial, keys: Keys) -> Path:
    """A site of north that has its key and no kit yet."""
    site = trial.root / "fresh" / "site-north"
    put_key(keys("north"), site)
    return site


def zipped(members: list[tuple[zipfile.ZipInfo | str, bytes]], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for info, data in members:
            archive.writestr(info, data)
    return buffer.getvalue()


def member(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    return info


def hostile() -> Iterator[tuple[str, list[tuple[zipfile.ZipInfo | str, bytes]]]]:
    """Yield members that are added to a good kit."""
    yield "zip-slip", [("../../escaped.txt", b"x")]
    yield "zip-slip by a folder of the kit", [("roster/../../escaped.pem", b"x")]
    yield "absolute", [("/tmp/fedllm-escaped.txt", b"x")]  # noqa: S108
    yield "drive", [("C:\\escaped.txt", b"x")]
    yield "backslashes", [("roster\\..\\..\\escaped.txt", b"x")]
    yield "symbolic link", [(member("roster/west.pem", stat.S_IFLNK | 0o777), b"/etc/passwd")]
    yield "device", [(member("roster/west.pem", stat.S_IFCHR | 0o666), b"")]
    yield "pipe", [(member("roster/west.pem", stat.S_IFIFO | 0o666), b"")]
    yield "folder", [(member("roster/west.pem/", stat.S_IFDIR | 0o755), b"")]
    yield "case clash", [("KIT.JSON", b"x")]
    yield "the same name twice", [("kit.json", b"x")]
    yield "unknown file", [("start.sh", b"x")]
    yield "unknown file in the roster", [("roster/west.pem.sh", b"x")]
    yield "hidden file", [("roster/.pem", b"x")]
    yield "a private key", [("key.pem", b"x")]
    yield "a pin", [("authority.pin", b"x")]
    yield "bomb", [("roster/west.pem", b"\0" * 1_000_000)]
    yield "large file", [("roster/west.pem", bytes(range(256)) * 5_000)]
    yield "many files", [(f"roster/n{i}.pem", b"x") for i in range(2_100)]
    yield "unusual compression", [(_compressed("roster/west.pem", zipfile.ZIP_BZIP2), b"x")]


def _compressed(name: str, how: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = how
    return info


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("members"), [pytest.param(added, id=name) for name, added in hostile()])
def test_a_hostile_archive_is_refused_and_writes_nothing(
    trial: Trial, fresh: Path, members: list[tuple[zipfile.ZipInfo | str, bytes]]
) -> None:
    good: list[tuple[zipfile.ZipInfo | str, bytes]] = [*trial.files().items()]
    path = trial.root / "kit.zip"
    path.write_bytes(zipped([*good, *members]))
    before = snapshot(trial.root)
    with pytest.raises(IdentityError) as caught:
        install_kit(path, fresh, authority=trial.authority.fingerprint)
    assert caught.value.code == "KIT_REFUSED" and "nothing was written" in caught.value.fix
    assert snapshot(trial.root) == before
    assert not Path("/tmp/fedllm-escaped.txt").exists()  # noqa: S108


def test_without_the_checks_an_archive_would_write_outside(
    trial: Trial, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trial.root / "kit.zip"
    path.write_bytes(zipped([*trial.files().items(), ("../../escaped.txt", b"x")]))
    escaped = fresh.parent / "escaped.txt"
    found: Verified = install_module.verify_files(trial.files(), pin=None, where="kit")
    monkeypatch.setattr(install_module, "_check_members", lambda *_: None)
    with pytest.raises(IdentityError):
        install_kit(path, fresh, authority=trial.authority.fingerprint)
    # The signature is a second line of defence; without it too the file lands outside.
    assert not escaped.exists()
    monkeypatch.setattr(install_module, "verify_files", lambda *_, **__: found)
    install_kit(path, fresh, authority=trial.authority.fingerprint)
    assert escaped.exists()


def renamed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new) and data.count(old) == 2
    return data.replace(old, new)


def test_a_name_with_a_null_byte_is_refused(trial: Trial) -> None:
    data = zipped([*trial.files().items(), ("kit.jsonXXXXXXXX", b"x")])
    with pytest.raises(IdentityError) as caught:
        unpack(renamed(data, b"kit.jsonXXXXXXXX", b"ca.pem\0/../../xx"), where="kit.zip")
    assert caught.value.code == "KIT_REFUSED"


def bomb(size: int) -> bytes:
    """Return an archive whose one file says that it is small, and is not."""
    data = zipped([("ca.pem", b"\0" * size)])
    small = struct.pack("<L", 90_000)
    return data.replace(struct.pack("<L", size), small)


def peak_of(data: bytes) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(IdentityError):
            unpack(data, where="kit.zip")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_archive_that_lies_about_its_size_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bomb(60_000_000)
    assert len(data) < 100_000
    monkeypatch.setattr(install_module, "_MAX_RATIO", 10**9)
    assert peak_of(data) < 4_000_000
    monkeypatch.setattr(install_module, "_content", lambda archive, member: archive.read(member))
    assert peak_of(data) > 50_000_000


def test_a_huge_archive_or_one_of_many_entries_takes_no_memory() -> None:
    assert peak_of(b"PK" * 2**22) < 1_000_000
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    directory = entry * 20_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 20_000, 20_000, len(directory), 0, 0)
    assert peak_of(directory + end) < 16_000_000


def test_an_encrypted_archive_is_refused(trial: Trial) -> None:
    data = bytearray(trial.kit_file.read_bytes())
    data[6] |= 1
    start = data.index(b"PK\1\2")
    data[start + 8] |= 1
    with pytest.raises(IdentityError) as caught:
        unpack(bytes(data), where="kit.zip")
    assert caught.value.code == "KIT_REFUSED"


def test_a_changed_bit_of_an_archive_is_refused_or_changes_nothing(provisioned: Trial) -> None:
    good, files, pin = provisioned.kit_file.read_bytes(), provisioned.files(), provisioned.authority.fingerprint
    refused = 0
    for count, place in enumerate(range(0, len(good), 11)):
        changed = bytearray(good)
        changed[place] ^= 1 << count % 8
        try:
            found = unpack(bytes(changed), where="kit.zip")
            install_module.verify_files(found, pin=pin, where="kit.zip")
        except IdentityError:
            refused += 1
        else:
            assert found == files
    assert refused > 500


@settings(max_examples=200)
@given(st.binary(max_size=300), st.booleans())
def test_bytes_that_are_no_kit_are_refused(data: bytes, has_end: bool) -> None:
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(data), 0, 0) if has_end else b""
    try:
        assert unpack(data + end, where="kit.zip") == {}
    except IdentityError as error:
        assert error.code == "KIT_REFUSED"


def test_a_truncated_archive_is_refused(provisioned: Trial) -> None:
    good = provisioned.kit_file.read_bytes()
    for length in (0, 1, 100, len(good) // 2, len(good) - 1):
        with pytest.raises(IdentityError):
            unpack(good[:length], where="kit.zip")


def test_the_same_files_make_the_same_archive(provisioned: Trial) -> None:
    files = provisioned.files()
    assert pack(files) == pack(dict(files)) == provisioned.kit_file.read_bytes()
    assert zlib.crc32(pack(files)) != zlib.crc32(pack({**files, "kit.sig": b""}))


def install(
    trial: Trial, site: Path, *, authority: str | None, kit: bytes | None = None, name: str | None = None
) -> str:
    path = trial.root / "given.zip"
    path.write_bytes(kit or trial.kit_file.read_bytes())
    try:
        return install_kit(path, site, authority=authority, name=name).name
    except (IdentityError, ConfigError) as error:
        return error.code


def test_a_first_kit_needs_a_confirmed_authority(trial: Trial, fresh: Path) -> None:
    right = trial.authority.fingerprint
    before = snapshot(fresh)
    assert install(trial, fresh, authority=None) == "AUTHORITY_UNCONFIRMED"
    assert install(trial, fresh, authority="sha256:" + "0" * 64) == "AUTHORITY_CHANGED"
    assert install(trial, fresh, authority="trust me") == "BAD_VALUE"
    assert snapshot(fresh) == before
    assert kit_authority(trial.kit_file) == right
    assert install(trial, fresh, authority=right.upper().replace("SHA256:", "")) == "north"
    assert install(trial, fresh, authority=None) == "north"
    assert install(trial, fresh, authority=right) == "north"


def test_the_unconfirmed_fingerprint_is_shown(trial: Trial, fresh: Path) -> None:
    with pytest.raises(IdentityError) as caught:
        install_kit(trial.kit_file, fresh, authority=None)
    assert trial.authority.fingerprint in caught.value.what and "coordinator" in caught.value.fix


@pytest.fixture
def rogue(keys: Keys, tmp_path: Path) -> Authority:
    return create_authority(tmp_path / "rogue", project=PROJECT.name, key=keys("rogue"))


def kit_of(trial: Trial, authority: Authority, *, issued: datetime.datetime | None = None) -> bytes:
    """Return a kit for north, with certificates that this authority made."""
    from fedllm.identity.requests import load_request

    sites = {
        "north": trial.north,
        "east": trial.root / "east/site-east",
        "server": trial.coordinator.site,
    }
    members = {name: authority.issue(load_request(site / "request.csr"), kind="party") for name, site in sites.items()}
    content = trial.content()
    content = Content(content.project, "north", "party", content.server, members["north"], members)
    return build_kit(authority, content, issued=issued)


def test_a_later_kit_from_another_authority_is_refused(trial: Trial, rogue: Authority) -> None:
    kit = kit_of(trial, rogue)
    before = snapshot(trial.north)
    assert install(trial, trial.north, authority=None, kit=kit) == "AUTHORITY_CHANGED"
    # Also where somebody confirms the other one: the site's pin must be moved away on purpose.
    assert install(trial, trial.north, authority=rogue.fingerprint, kit=kit) == "AUTHORITY_CHANGED"
    assert snapshot(trial.north) == before
    (trial.north / "authority.pin").unlink()
    assert install(trial, trial.north, authority=rogue.fingerprint, kit=kit) == "north"


def test_an_older_kit_does_not_replace_a_newer_one(trial: Trial) -> None:
    now = datetime.datetime.now(datetime.UTC)
    older = kit_of(trial, trial.authority, issued=now - datetime.timedelta(days=1))
    newer = kit_of(trial, trial.authority, issued=now + datetime.timedelta(seconds=1))
    assert install(trial, trial.north, authority=None, kit=older) == "KIT_REFUSED"
    assert install(trial, trial.north, authority=None, kit=newer) == "north"
    assert install(trial, trial.north, authority=None) == "KIT_REFUSED"


def test_another_site_s_kit_is_refused(trial: Trial) -> None:
    east = (trial.coordinator.kits / "east.zip").read_bytes()
    assert install(trial, trial.north, authority=None, kit=east, name="north") == "KIT_REFUSED"
    assert install(trial, trial.north, authority=None, kit=east) == "CERT_REFUSED"
    assert open_kit(trial.north).name == "north"


def test_a_kit_without_the_key_that_asked_for_it_is_refused(trial: Trial, tmp_path: Path) -> None:
    assert install(trial, tmp_path / "empty", authority=trial.authority.fingerprint) == "BAD_KEY"
    assert not (tmp_path / "empty").exists()


def test_an_expired_kit_is_not_installed(trial: Trial, fresh: Path, keys: Keys) -> None:
    from fedllm.identity.requests import Request

    request = Request("north", keys("north").public_key(), b"")
    over = trial.authority.issue(request, kind="party", days=-1)
    content = trial.content()
    roster = {**content.roster, "north": over}
    kit = build_kit(trial.authority, Content("trial", "north", "party", content.server, over, roster))
    assert install(trial, fresh, authority=trial.authority.fingerprint, kit=kit) == "CERT_EXPIRED"


def test_an_installation_that_was_cut_off_is_done_again(trial: Trial) -> None:
    (trial.north / "kit").rename(trial.north / ".kit.old")
    (trial.north / ".kit.new/roster").mkdir(parents=True)
    (trial.north / ".kit.new/kit.json").write_bytes(b"half")
    with pytest.raises(IdentityError) as caught:
        open_kit(trial.north)
    assert caught.value.code == "KIT_MISSING"
    assert install(trial, trial.north, authority=None) == "north"
    assert not list(trial.north.glob(".kit*"))


def test_a_damaged_kit_is_mended_by_installing_it_again(trial: Trial) -> None:
    (trial.north / "kit/kit.json").write_bytes(b"{}")
    assert install(trial, trial.north, authority=None) == "north"


def test_a_full_disk_leaves_the_kit_that_was_there(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = snapshot(trial.north / "kit")
    with monkeypatch.context() as patch:
        patch.setattr(install_module.os, "fsync", full)
        with pytest.raises(ResourceError) as caught:
            install_kit(trial.kit_file, trial.north, authority=None)
    assert caught.value.code == "DISK_FULL"
    assert snapshot(trial.north / "kit") == before and open_kit(trial.north)


def test_a_kit_that_is_not_there_is_named(trial: Trial) -> None:
    with pytest.raises(ConfigError) as caught:
        install_kit(trial.root / "absent.zip", trial.north, authority=None)
    assert caught.value.code == "FILE_NOT_FOUND" and "absent.zip" in caught.value.where
