"""Private keys: kept from others, never overwritten, and refused when weak or exposed."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from identities import Keys, weak_key

from fedllm.errors import ExitCode, IdentityError
from fedllm.identity.keys import KEY_BITS, check_public_key, key_fingerprint, load_key, new_key, save_key


def private_pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, password: bytes | None = None) -> bytes:
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def refused(path: Path) -> IdentityError:
    with pytest.raises(IdentityError) as caught:
        load_key(path)
    assert caught.value.exit_code == ExitCode.IDENTITY and caught.value.fix
    return caught.value


def write_private(path: Path, data: bytes) -> Path:
    path.touch(mode=0o600)
    path.write_bytes(data)
    return path


def test_a_new_key_has_3072_bits() -> None:
    assert new_key().key_size == KEY_BITS == 3072


def test_a_saved_key_is_loaded_and_only_its_owner_can_read_it(tmp_path: Path, keys: Keys) -> None:
    save_key(keys("a"), tmp_path / "key.pem")
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    assert load_key(tmp_path / "key.pem").private_numbers() == keys("a").private_numbers()


def test_a_key_is_never_overwritten(tmp_path: Path, keys: Keys) -> None:
    save_key(keys("a"), tmp_path / "key.pem")
    before = (tmp_path / "key.pem").read_bytes()
    with pytest.raises(IdentityError) as caught:
        save_key(keys("b"), tmp_path / "key.pem")
    assert caught.value.code == "KEY_EXISTS"
    assert (tmp_path / "key.pem").read_bytes() == before


def test_a_key_is_not_written_through_a_link(tmp_path: Path, keys: Keys) -> None:
    (tmp_path / "key.pem").symlink_to(tmp_path / "elsewhere.pem")
    with pytest.raises(IdentityError):
        save_key(keys("a"), tmp_path / "key.pem")
    assert not (tmp_path / "elsewhere.pem").exists()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_can_reach_is_refused(tmp_path: Path, keys: Keys, mode: int) -> None:
    path = write_private(tmp_path / "key.pem", private_pem(keys("a")))
    path.chmod(mode)
    error = refused(path)
    assert error.code == "KEY_EXPOSED" and f"chmod 600 {path}" in error.fix
    path.chmod(0o600)
    assert load_key(path)


def test_a_weak_key_is_refused(tmp_path: Path) -> None:
    weak = weak_key()
    assert refused(write_private(tmp_path / "key.pem", private_pem(weak))).code == "WEAK_KEY"


def test_a_key_with_a_small_exponent_is_refused() -> None:
    key = rsa.RSAPublicNumbers(e=3, n=2**2048 - 1).public_key()
    with pytest.raises(IdentityError) as caught:
        check_public_key(key, where="north")
    assert caught.value.code == "WEAK_KEY" and caught.value.where == "north"


def test_what_is_no_usable_key_is_refused_and_not_quoted(tmp_path: Path, keys: Keys) -> None:
    cases = {
        "text": b"hunter2 is the password",
        "empty": b"",
        "cut": private_pem(keys("a"))[:-200],
        "encrypted": private_pem(keys("a"), b"secret"),
        "elliptic": private_pem(ec.generate_private_key(ec.SECP256R1())),
    }
    for name, data in cases.items():
        error = refused(write_private(tmp_path / name, data))
        assert error.code == "BAD_KEY", name
        assert "hunter2" not in str(error)
    assert refused(tmp_path / "absent").code == "BAD_KEY"
    assert refused(tmp_path).code == "BAD_KEY"


def test_a_fingerprint_names_one_key(keys: Keys) -> None:
    prints = {key_fingerprint(keys(name).public_key()) for name in ("a", "b", "a")}
    assert len(prints) == 2
    assert all(len(each.removeprefix("sha256:")) == 64 for each in prints)
