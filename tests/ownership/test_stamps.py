"""Time stamps on commitments: an authority of the test's own, and stamps that prove nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from claims_made import BEFORE, KEYS, claim_of, signed
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm.errors import ConfigError, ResourceError
from fedllm.ownership.claims import Claim, new_secret, save_claim, stamp_file
from fedllm.ownership.commitments import commit_to
from fedllm.ownership.disputes import Standing, standing
from fedllm.ownership.keys import public_hex
from fedllm.ownership.log import OwnershipLog, commitment_entry, party_entry
from fedllm.ownership.stamps import by_stamp, read_certificates, with_stamp
from fedllm.ownership.triggers import make_triggers
from fedllm.ownership.verify import Reading, judge

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the command openssl")
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("rfc3161_client") is None, reason="needs the extra fedllm[stamps]"
)
PEM = serialization.Encoding.PEM
CONFIG = """
[tsa]
default_tsa = this
[this]
serial = ./serial
signer_digest = sha256
default_policy = 1.2.3.4
digests = sha256
ess_cert_id_alg = sha256
"""
# The content of a time stamp token, RFC 3161, section 2.4.2.
TST_INFO = "1.2.840.113549.1.9.16.1.4"


class Authority:
    """A time stamping authority in a folder, with a root and a certificate below it that signs."""

    def __init__(self, folder: Path, usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.TIME_STAMPING) -> None:
        folder.mkdir()
        self.folder = folder
        root, signer = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self._write("root", certificate("root", root, root, None))
        self._write("signer", certificate("signer", signer, root, usage))
        key = signer.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / "signer.key").write_bytes(key)
        (folder / "ts.cnf").write_text(CONFIG)
        (folder / "serial").write_text("01\n")

    @property
    def root(self) -> Path:
        return self.folder / "root.pem"

    def _write(self, name: str, made: x509.Certificate) -> None:
        (self.folder / f"{name}.pem").write_bytes(made.public_bytes(PEM))

    def call(self, *words: str) -> None:
        subprocess.run(["openssl", *words], cwd=self.folder, check=True, capture_output=True)

    def stamp(self, digest: str) -> bytes:
        self.call("ts", "-query", "-sha256", "-digest", digest, "-cert", "-out", "query.tsq")
        reply = ("-config", "ts.cnf", "-queryfile", "query.tsq", "-signer", "signer.pem", "-inkey", "signer.key")
        self.call("ts", "-reply", *reply, "-out", "answer.tsr")
        return (self.folder / "answer.tsr").read_bytes()

    def sign_again(self, stamp: bytes) -> bytes:
        """Return a stamp's content, signed by this authority's certificate whatever that one is for."""
        (self.folder / "other.tsr").write_bytes(stamp)
        self.call("ts", "-reply", "-in", "other.tsr", "-token_out", "-out", "other.tok")
        self.call("cms", "-verify", "-noverify", "-inform", "DER", "-in", "other.tok", "-binary", "-out", "content")
        signing = ("-signer", "signer.pem", "-inkey", "signer.key", "-md", "sha256", "-cades", "-outform", "DER")
        content = ("-binary", "-nodetach", "-econtent_type", TST_INFO, "-in", "content")
        self.call("cms", "-sign", *content, *signing, "-out", "own.tok")
        # TimeStampResp: a status that says granted, and the token.
        body = bytes.fromhex("3003020100") + (self.folder / "own.tok").read_bytes()
        return b"\x30\x82" + len(body).to_bytes(2, "big") + body


def certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: ec.EllipticCurvePrivateKey,
    usage: x509.ObjectIdentifier | None,
) -> x509.Certificate:
    called, root = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, "root"))
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        root, called, key.public_key(), x509.random_serial_number(), now - timedelta(1), now + timedelta(9)
    ).add_extension(x509.BasicConstraints(ca=usage is None, path_length=None), critical=True)
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
    return builder.sign(issuer, hashes.SHA256())


def text_claim_of(party: str = "north") -> Claim:
    """Return a claim by answers alone: a log without shares says when, and needs to say no more."""
    key = new_secret()
    return claim_of(party, carrier="none", sites=(), bits="", key_seed=key, triggers=make_triggers(key, 4))


# (data of a stamp, file of a certificate, time of the log) -> the standing of the claim it is beside.
Judged = Callable[..., Standing]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority") / "own")


@pytest.fixture
def claim() -> Claim:
    return text_claim_of()


@pytest.fixture
def judged(claim: Claim, tmp_path: Path) -> Judged:
    def judge(stamp: bytes, *trusted: Path, time: str | None = None) -> Standing:
        (tmp_path / "beside.tsr").write_bytes(stamp)
        commitment = commit_to(claim, KEYS["north"], stamp=hashlib.sha256(stamp).hexdigest())
        entries = (party_entry("north", public_hex(KEYS["north"])), commitment_entry(commitment))
        log = signed(OwnershipLog(entries), 0, time or datetime.now(UTC).isoformat(), by=["north"])
        return with_stamp(standing(claim, log), claim, tmp_path / "beside.tsr", read_certificates(trusted))

    return judge


@needs_openssl
@needs_library
def test_a_stamp_says_when_the_commitment_was_there(claim: Claim, authority: Authority, judged: Judged) -> None:
    found = judged(authority.stamp(claim.commitment()), authority.root)
    assert found.reasons == () and found.place is not None
    stamped = datetime.fromisoformat(found.place.stamp_time)
    assert abs(stamped - datetime.now(UTC)) < timedelta(minutes=1)


@needs_openssl
@needs_library
def test_stamps_that_prove_nothing_are_told_apart(
    claim: Claim, authority: Authority, judged: Judged, tmp_path: Path
) -> None:
    good, other = authority.stamp(claim.commitment()), Authority(tmp_path / "other")
    server = Authority(tmp_path / "server", ExtendedKeyUsageOID.SERVER_AUTH)
    attacks = {
        "vouches for the authority": (good, other.root),
        "on another digest": (authority.stamp("ab" * 32), authority.root),
        "not for time stamping": (server.sign_again(good), server.root),
        "no answer of a time stamping authority": (b"20 March 2026" + bytes.fromhex(claim.commitment()), other.root),
        "the log says that it was there before": (good, authority.root, BEFORE),
    }
    for why, (stamp, root, *time) in attacks.items():
        # Without certificates nobody looks, and the stamp passes for what it is said to be.
        assert judged(stamp, time=next(iter(time), None)).reasons == ()
        found = judged(stamp, root, time=next(iter(time), None))
        assert [why in reason for reason in found.reasons] == [True], (why, found.reasons)
    # What was signed again is a stamp like any other, where the certificate is for that.
    assert judged(other.sign_again(good), other.root).reasons == ()


@needs_openssl
@needs_library
def test_a_stamp_that_was_exchanged_or_lost_does_not_hold(
    claim: Claim, authority: Authority, judged: Judged, tmp_path: Path
) -> None:
    found = judged(authority.stamp(claim.commitment()))
    trusted = read_certificates([authority.root])
    (tmp_path / "newer.tsr").write_bytes(authority.stamp(claim.commitment()))
    for name, why in (("newer.tsr", "another stamp than the log names"), ("gone.tsr", "is not beside the claim")):
        (reason,) = with_stamp(found, claim, tmp_path / name, trusted).reasons
        assert why in reason


def test_a_claim_without_a_stamp_stands_as_it_did(claim: Claim, tmp_path: Path) -> None:
    entries = (party_entry("north", public_hex(KEYS["north"])), commitment_entry(commit_to(claim, KEYS["north"])))
    found = standing(claim, signed(OwnershipLog(entries), 0, BEFORE, by=["north"]))
    root = certificate("root", key := ec.generate_private_key(ec.SECP256R1()), key, None)
    assert with_stamp(found, claim, tmp_path / "none.tsr", [root]) == found


@pytest.mark.parametrize("library", [True, False])
def test_what_is_no_certificate_is_refused(library: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if library else None)
    (tmp_path / "text.pem").write_text("no certificate")
    if not library:
        with pytest.raises(ResourceError, match="DEVICE_MISSING"):
            read_certificates([tmp_path / "text.pem"])
        return
    with pytest.raises(ConfigError, match="BAD_VALUE"):
        read_certificates([tmp_path / "text.pem"])
    with pytest.raises(ConfigError, match="FILE_NOT_FOUND"):
        read_certificates([tmp_path / "gone.pem"])


@needs_openssl
@needs_library
def test_a_stamp_stands_in_the_place_of_a_log_for_text_alone(
    claim: Claim, authority: Authority, tmp_path: Path
) -> None:
    save_claim(claim, tmp_path / "own.claim.json")
    stamp, trusted = stamp_file(tmp_path / "own.claim.json"), read_certificates([authority.root])
    read = [Reading("text", "generate", 4, 4, 1e-28)]
    assert by_stamp(claim, stamp, trusted) is None
    (verdict,) = judge([claim], [None], lambda one: read)
    assert verdict.status == "rejected" and "4 of 4 answers" in verdict.sentence and "no log is" in verdict.sentence
    stamp.write_bytes(authority.stamp(claim.commitment()))
    assert by_stamp(claim, stamp, []) is None
    (verdict,) = judge([claim], [by_stamp(claim, stamp, trusted)], lambda one: read)
    assert verdict.upheld and "as a verified time stamp says" in verdict.sentence and verdict.place is None
    late = by_stamp(claim, stamp, trusted, seen=datetime.now(UTC) - timedelta(days=1))
    assert late is not None and "was seen on" in late.reasons[0]
    # Of another claim it says nothing; and where bits are is said by a log alone.
    other = by_stamp(text_claim_of(), stamp, trusted)
    assert other is not None and "on another digest" in other.reasons[0]
    bits = claim_of()
    stamp.write_bytes(authority.stamp(bits.commitment()))
    assert by_stamp(bits, stamp, trusted) is None
