"""The authority: what it signs is what FLARE and TLS accept, and no more than the project's file gives."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import ssl
import warnings
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from identities import Keys, Trial, put_key, weak_key

from fedllm.errors import ExitCode, IdentityError
from fedllm.identity.authority import Authority, Kind, create_authority, open_authority
from fedllm.identity.certificates import Holder, check_dates, check_holder, common_name, read_certificate
from fedllm.identity.requests import load_request, make_request, read_request


@pytest.fixture(scope="module")
def authority(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return create_authority(tmp_path_factory.mktemp("authority"), project="trial", key=keys("authority"))


def request_of(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, *names: x509.NameAttribute) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def cn(name: str) -> x509.NameAttribute:
    return x509.NameAttribute(NameOID.COMMON_NAME, name)


def certificate_of(
    authority: Authority, keys: Keys, *, kind: Kind, name: str, host: str | None = None, days: int = 365
) -> x509.Certificate:
    pem = request_of(keys(name), cn(name))
    return read_certificate(authority.sign_request(pem, kind=kind, name=name, host=host, days=days), where=name)


def code_of(action: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(IdentityError) as caught:
        action(*args, **kwargs)  # type: ignore[operator]
    assert caught.value.exit_code == ExitCode.IDENTITY and caught.value.fix
    return caught.value.code


@pytest.mark.parametrize(("kind", "name"), [("party", "north"), ("server", "server"), ("admin", "admin")])
def test_flare_accepts_the_certificates(authority: Authority, keys: Keys, kind: Kind, name: str) -> None:
    utils = pytest.importorskip("nvflare.lighter.utils")
    admin_cert = pytest.importorskip("nvflare.fuel.sec.admin_cert")
    certificate = certificate_of(authority, keys, kind=kind, name=name, host="10.0.0.7" if kind == "server" else None)
    utils.verify_cert_chain(certificate, [], authority.certificate)
    utils.verify_cert(certificate, authority.certificate.public_key())
    if kind == "admin":
        admin_cert.validate_admin_leaf_cert(certificate)
        assert utils._cert_to_submitter(certificate) == ("admin", "trial", "project_admin")


def test_flare_s_challenge_is_passed_by_the_holder_alone(authority: Authority, keys: Keys, tmp_path: Path) -> None:
    identity = pytest.importorskip("nvflare.private.fed.utils.identity_utils")
    put_key(keys("north"), tmp_path)
    put_key(keys("east"), tmp_path / "east")
    certificate = certificate_of(authority, keys, kind="party", name="north")
    (tmp_path / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    verifier = identity.IdentityVerifier(str(tmp_path / "ca.pem"))

    def passes(key_file: Path, purpose: x509.ObjectIdentifier) -> bool:
        asserter = identity.IdentityAsserter(str(key_file), str(tmp_path / "cert.pem"))
        signature = asserter.sign_common_name("nonce")
        return bool(verifier.verify_common_name("north", "nonce", asserter.cert, signature, [], purpose))

    assert passes(tmp_path / "key.pem", ExtendedKeyUsageOID.CLIENT_AUTH)
    with pytest.raises(identity.InvalidCNSignature):
        passes(tmp_path / "east" / "key.pem", ExtendedKeyUsageOID.CLIENT_AUTH)
    with pytest.raises(identity.InvalidAsserterCert):
        passes(tmp_path / "key.pem", ExtendedKeyUsageOID.SERVER_AUTH)


class Ends:
    """Two ends of TLS in memory."""

    def __init__(self, server: Path, client: Path, *, host: str) -> None:
        accept, connect = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        accept.verify_mode = ssl.CERT_REQUIRED
        for context, site in ((accept, server), (connect, client)):
            context.load_cert_chain(site / "kit" / "cert.pem", site / "key.pem")
            context.load_verify_locations(site / "kit" / "ca.pem")
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = accept.wrap_bio(up, down, server_side=True)
        self.client = connect.wrap_bio(down, up, server_hostname=host)

    def shake_hands(self) -> None:
        for end in (self.client, self.server) * 3:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
        self.client.do_handshake()


def test_parties_and_server_shake_hands_over_tls(provisioned: Trial) -> None:
    ends = Ends(provisioned.coordinator.site, provisioned.north, host="fl.example.org")
    ends.shake_hands()
    assert ends.client.version() == "TLSv1.3"
    assert ends.server.getpeercert()["subject"][0] == (("commonName", "north"),)  # type: ignore[index]


def test_a_server_under_another_address_is_refused(provisioned: Trial) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        Ends(provisioned.coordinator.site, provisioned.north, host="elsewhere.example.org").shake_hands()


def test_a_party_cannot_pose_as_the_server(provisioned: Trial, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="unsuitable certificate purpose"):
        Ends(provisioned.root / "east" / "site-east", provisioned.north, host="east").shake_hands()
    # With the server's purpose and a name, which only the server's certificate has, it could.
    trial = provisioned.copy(tmp_path)
    east = trial.root / "east" / "site-east"
    request = load_request(east / "request.csr")
    (east / "kit" / "cert.pem").write_bytes(trial.authority.issue(request, kind="server", host="east"))
    Ends(east, trial.north, host="east").shake_hands()


def alternative_names(certificate: x509.Certificate) -> list[object]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [name.value for name in names]


def test_this_machine_s_own_names_are_only_in_a_certificate_for_this_machine(authority: Authority, keys: Keys) -> None:
    names = {
        host: alternative_names(certificate_of(authority, keys, kind="server", name="server", host=host))
        for host in ("10.0.0.7", "fl.example.org", "127.0.0.1", "localhost")
    }
    here = ipaddress.ip_address("127.0.0.1")
    assert names == {
        "10.0.0.7": [ipaddress.ip_address("10.0.0.7")],
        "fl.example.org": ["fl.example.org"],
        "127.0.0.1": [here, "localhost"],
        "localhost": ["localhost", here],
    }


def test_a_serial_number_that_is_not_positive_is_refused_without_a_filter_for_every_thread(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "catch_warnings", None)
    der = authority.certificate.public_bytes(serialization.Encoding.DER)
    serial = authority.certificate.serial_number.to_bytes(20, "big").lstrip(b"\0")
    assert der.count(serial) == 1
    for number in (bytes(len(serial)), b"\xff" + serial[1:]):
        body = base64.b64encode(der.replace(serial, number)).decode()
        pem = f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n".encode()
        for action in ("error", "ignore"):
            warnings.simplefilter(action, CryptographyDeprecationWarning)  # pytest puts its own back
            assert code_of(read_certificate, pem, where="north") == "CERT_REFUSED"


def test_a_request_gets_a_name_and_nothing_else_that_it_asks_for(authority: Authority, keys: Keys) -> None:
    role = x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, "project_admin")
    names = x509.SubjectAlternativeName([x509.DNSName("fl.example.org")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([cn("north"), role]))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(names, critical=False)
    pem = builder.sign(keys("north"), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    certificate = read_certificate(authority.sign_request(pem, kind="party", name="north"), where="north")
    check_holder(certificate, Holder(authority.certificate, "north"), where="north")
    assert not certificate.subject.get_attributes_for_oid(NameOID.UNSTRUCTURED_NAME)
    with pytest.raises(x509.ExtensionNotFound):
        alternative_names(certificate)


def test_a_request_that_cannot_be_trusted_is_refused(authority: Authority, keys: Keys) -> None:
    good = request_of(keys("north"), cn("north"))
    der = bytearray(x509.load_pem_x509_csr(good).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    cases = {
        "text": (b"let me in", "REQUEST_REFUSED"),
        "cut": (good[:-100], "REQUEST_REFUSED"),
        "two": (good + good, "REQUEST_REFUSED"),
        "huge": (good + b"\n" * 100_000, "REQUEST_REFUSED"),
        "not its own key": (forged, "REQUEST_REFUSED"),
        "another name": (request_of(keys("north"), cn("east")), "REQUEST_REFUSED"),
        "no name": (request_of(keys("north")), "REQUEST_REFUSED"),
        "two names": (request_of(keys("north"), cn("north"), cn("east")), "REQUEST_REFUSED"),
        "weak": (request_of(weak_key(), cn("north")), "WEAK_KEY"),
        "elliptic": (request_of(ec.generate_private_key(ec.SECP256R1()), cn("north")), "BAD_KEY"),
    }
    for name, (pem, code) in cases.items():
        assert code_of(authority.sign_request, pem, kind="party", name="north") == code, name
    assert authority.sign_request(good, kind="party", name="north")


def test_a_second_request_keeps_the_key(keys: Keys, tmp_path: Path) -> None:
    put_key(keys("north"), tmp_path)
    first = load_request(make_request(tmp_path, "north"))
    second = load_request(make_request(tmp_path, "north"))
    assert first.fingerprint == second.fingerprint
    assert first.key == keys("north").public_key()


def test_a_request_does_not_hold_the_key(keys: Keys, tmp_path: Path) -> None:
    put_key(keys("north"), tmp_path)
    assert b"PRIVATE" not in make_request(tmp_path, "north").read_bytes()


def test_a_request_with_an_exposed_key_is_not_made(keys: Keys, tmp_path: Path) -> None:
    put_key(keys("north"), tmp_path)
    (tmp_path / "key.pem").chmod(0o644)
    assert code_of(make_request, tmp_path, "north") == "KEY_EXPOSED"


def test_an_authority_is_made_once(keys: Keys, tmp_path: Path) -> None:
    first = create_authority(tmp_path, project="trial", key=keys("authority"))
    second = create_authority(tmp_path, project="trial")
    assert first.fingerprint == second.fingerprint
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600


def test_an_authority_goes_on_after_a_crash_between_key_and_certificate(keys: Keys, tmp_path: Path) -> None:
    create_authority(tmp_path, project="trial", key=keys("authority"))
    (tmp_path / "ca.pem").unlink()
    again = create_authority(tmp_path, project="trial")
    assert again.certificate.public_key() == keys("authority").public_key()


def test_an_authority_that_is_not_whole_is_not_replaced(keys: Keys, tmp_path: Path) -> None:
    create_authority(tmp_path, project="trial", key=keys("authority"))
    assert code_of(create_authority, tmp_path, project="another") == "AUTHORITY_CHANGED"
    (tmp_path / "ca.key").chmod(0o640)
    assert code_of(create_authority, tmp_path, project="trial") == "KEY_EXPOSED"
    (tmp_path / "ca.key").unlink()
    assert code_of(create_authority, tmp_path, project="trial") == "AUTHORITY_MISSING"
    assert code_of(open_authority, tmp_path / "absent", project="trial") == "AUTHORITY_MISSING"
    put_key(keys("north"), tmp_path)
    (tmp_path / "key.pem").rename(tmp_path / "ca.key")
    assert code_of(create_authority, tmp_path, project="trial") == "CERT_REFUSED"


def test_a_certificate_never_outlives_the_authority(authority: Authority, keys: Keys) -> None:
    certificate = certificate_of(authority, keys, kind="party", name="north", days=10_000)
    assert certificate.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_clocks_may_be_a_day_apart(authority: Authority, keys: Keys) -> None:
    certificate = certificate_of(authority, keys, kind="party", name="north")
    now = datetime.datetime.now(datetime.UTC)
    for offset in (datetime.timedelta(days=-1), datetime.timedelta(days=1)):
        check_dates(certificate, where="north", now=now + offset)
        check_dates(authority.certificate, where="authority", now=now + offset)


def test_dates_are_refused_each_with_its_own_text(authority: Authority, keys: Keys) -> None:
    certificate = certificate_of(authority, keys, kind="party", name="north", days=10)
    end = certificate.not_valid_after_utc
    with pytest.raises(IdentityError) as caught:
        check_dates(certificate, where="north", now=end + datetime.timedelta(hours=1))
    assert caught.value.code == "CERT_EXPIRED" and f"expired on {end:%Y-%m-%d}" in caught.value.what
    begin = certificate.not_valid_before_utc
    with pytest.raises(IdentityError) as caught:
        check_dates(certificate, where="north", now=begin - datetime.timedelta(hours=1))
    assert caught.value.code == "CERT_NOT_YET_VALID" and f"from {begin:%Y-%m-%d}" in caught.value.what
    assert code_of(
        check_dates, certificate_of(authority, keys, kind="party", name="north", days=-1), where="north"
    ) == ("CERT_EXPIRED")


def test_a_request_says_whose_it_is(keys: Keys) -> None:
    request = read_request(request_of(keys("north"), cn("north")), where="north.csr")
    assert request.name == "north"
    assert common_name(x509.Name([cn("a"), cn("b")])) == ""
