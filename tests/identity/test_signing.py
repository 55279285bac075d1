"""Signatures: made by one party for one purpose over exactly these bytes, and by nobody else."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from identities import Keys, self_signed, weak_key

from fedllm.errors import ExitCode, IdentityError, PayloadError
from fedllm.identity.signing import Roster, Signer, fingerprint


@pytest.fixture(scope="module")
def roster(keys: Keys) -> Roster:
    return Roster({name: self_signed(keys(name), name) for name in ("north", "east", "server")})


def refused(roster: Roster, name: str, data: bytes, signature: bytes) -> PayloadError:
    with pytest.raises(PayloadError) as caught:
        roster.verify(name, data, signature)
    assert caught.value.exit_code == ExitCode.IDENTITY and caught.value.fix
    return caught.value


def test_a_party_s_signature_is_accepted(keys: Keys, roster: Roster) -> None:
    roster.verify("north", b"round 3", Signer(keys("north")).sign(b"round 3"))
    roster.verify("server", b"", Signer(keys("server")).sign(b""))


def test_a_change_of_any_bit_of_the_data_is_refused(keys: Keys, roster: Roster) -> None:
    data = b"round 3 of 12"
    signature = Signer(keys("north")).sign(data)
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert refused(roster, "north", bytes(changed), signature).code == "BAD_SIGNATURE"
    assert refused(roster, "north", data + b"\0", signature).code == "BAD_SIGNATURE"


@pytest.mark.parametrize("signature", [b"", b"\0" * 256, b"\xff" * 256, b"x" * 10_000])
def test_what_is_no_signature_is_refused(roster: Roster, signature: bytes) -> None:
    assert refused(roster, "north", b"round 3", signature).code == "BAD_SIGNATURE"


def test_another_party_s_signature_is_refused(keys: Keys, roster: Roster) -> None:
    error = refused(roster, "north", b"round 3", Signer(keys("east")).sign(b"round 3"))
    assert error.code == "BAD_SIGNATURE" and error.where == "north"


def test_a_name_that_is_not_on_the_roster_is_refused(keys: Keys, roster: Roster) -> None:
    error = refused(roster, "nort", b"round 3", Signer(keys("north")).sign(b"round 3"))
    assert error.code == "NOT_ON_ROSTER" and "did you mean `north`?" in error.fix
    assert len(str(refused(roster, "n" * 10_000, b"", b""))) < 500


def test_a_signature_for_one_purpose_is_none_for_another(keys: Keys, roster: Roster) -> None:
    signature = Signer(keys("north")).sign(b"job 1", purpose="approval")
    roster.verify("north", b"job 1", signature, purpose="approval")
    assert refused(roster, "north", b"job 1", signature).code == "BAD_SIGNATURE"


def test_a_signature_that_flare_makes_with_the_same_key_is_none_of_ours(keys: Keys, roster: Roster) -> None:
    # FLARE lets a peer choose a part of what a client signs, with the longest salt instead of ours.
    scheme = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.MAX_LENGTH)
    signature = keys("north").sign(b"fedllm message\0round 3", scheme, hashes.SHA256())
    assert refused(roster, "north", b"round 3", signature).code == "BAD_SIGNATURE"


def test_a_certificate_with_a_weak_key_is_not_taken_up() -> None:
    weak = weak_key()
    with pytest.raises(IdentityError) as caught:
        Roster({"north": self_signed(weak, "north")})
    assert caught.value.code == "WEAK_KEY" and caught.value.where == "north"


def test_a_roster_tells_who_is_on_it(keys: Keys, roster: Roster) -> None:
    assert list(roster) == ["north", "east", "server"] and len(roster) == 3
    assert "north" in roster and "west" not in roster
    assert roster.fingerprint("north") == fingerprint(roster.certificate("north"))
    assert roster.fingerprint("north") != roster.fingerprint("east")
