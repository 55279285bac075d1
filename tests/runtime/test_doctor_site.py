"""`fedllm doctor` finds each fault that is planted at a site or a coordinator, and says how to mend it."""

from __future__ import annotations

import datetime
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from by_hand import held
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from tiny import TinyFederation, tiny_federation

from fedllm.errors import ConfigError
from fedllm.identity import keys
from fedllm.identity.authority import Authority, open_authority
from fedllm.identity.files import CoordinatorFolder
from fedllm.identity.keys import load_key, new_key, save_key
from fedllm.identity.kit import Address, Content, Kit, open_kit, signed_files
from fedllm.job.project import Project
from fedllm.runs.audit_log import AuditLog
from fedllm.runs.control import SUPERVISOR_LOCK
from fedllm.runtime import doctor, doctor_site
from fedllm.runtime.doctor import Finding
from fedllm.runtime.doctor_site import examine_job, examine_party, examine_project, examine_submission
from fedllm.runtime.provision import provision_all
from fedllm.runtime.reach import reach

NAMES = ["north", "east"]
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Trial:
    """A project on one machine: the coordinator's folder, and the site of north."""

    root: Path

    @property
    def project_file(self) -> Path:
        return self.root / "project.yaml"

    @property
    def party_file(self) -> Path:
        return self.root / "north.yaml"

    @property
    def north(self) -> Path:
        return self.root / "site-north"

    @property
    def coordinator(self) -> CoordinatorFolder:
        return CoordinatorFolder.beside(self.project_file)

    @property
    def authority(self) -> Authority:
        return open_authority(self.coordinator.authority, project="trial")

    def kit(self, *, port: int | None = None) -> Kit:
        kit = open_kit(self.north)
        return kit if port is None else Kit(**{**vars(kit), "port": port})

    def party(self) -> list[Finding]:
        return examine_party(self.party_file)

    def project(self) -> list[Finding]:
        return examine_project(self.project_file)

    def plant(self, *, certificate: bytes | None = None, issued: datetime.datetime = NOW) -> None:
        """Sign another kit for north, with another certificate or date, past the checks of an installation."""
        kit = self.north / "kit"
        roster = {path.stem: path.read_bytes() for path in (kit / "roster").iterdir()}
        if certificate is not None:
            roster["north"] = certificate
        address = Address(host="127.0.0.1", port=8002)
        content = Content("trial", "north", "party", address, roster["north"], roster)
        for path, data in signed_files(self.authority, content, issued=issued).items():
            (kit / path).write_bytes(data)


def made_certificate(
    authority: Authority, key: rsa.RSAPrivateKey, name: str, *, host: str = "127.0.0.1", days: tuple[int, int] = (-2, 9)
) -> bytes:
    """Return a certificate of the authority with any host and any dates, in days from now."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    try:
        alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        alternative = x509.DNSName(host)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(authority.certificate.subject)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(NOW + days[0] * DAY).not_valid_after(NOW + days[1] * DAY)
    builder = builder.add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
    # OpenSSL 3 asks for both.
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    above = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = builder.add_extension(own, critical=False).add_extension(above, critical=False)
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """A function that provisions a project once per port, with short keys."""

    def provision(name: str = "trial", **more: Any) -> Path:
        root = tmp_path_factory.mktemp(name)
        values = {"name": name, "server": {"host": "127.0.0.1", "port": 8002}, "parties": NAMES} | more
        project = Project.model_validate(values)
        provision_all(root / "coordinator", project, {party: root / f"site-{party}" for party in NAMES})
        (root / "project.yaml").write_text(
            f"name: {name}\nserver: {{host: 127.0.0.1, port: 8002}}\nparties: [north, east]\n"
        )
        for party in NAMES:
            (root / f"{party}.yaml").write_text(f"name: {party}\ndata: {{train: train.jsonl}}\n")
        return root

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys.new_key, "__kwdefaults__", {"bits": keys.MIN_KEY_BITS})
        yield provision


@pytest.fixture(scope="module")
def original(provisioned: Callable[..., Path]) -> Path:
    return provisioned()


@pytest.fixture(scope="module")
def stranger(provisioned: Callable[..., Path]) -> Trial:
    """Another project, with another authority."""
    return Trial(provisioned("stranger"))


@pytest.fixture
def trial(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    monkeypatch.setattr(doctor_site, "reach", lambda kit: [])
    shutil.copytree(original, tmp_path / "trial", copy_function=shutil.copy2)
    return Trial(tmp_path / "trial")


def faults(found: list[Finding]) -> dict[str, str]:
    """Return what is not well, by name; each has its mend."""
    assert all(item.fix for item in found if item.state != "ok")
    return {item.name: f"{item.state}: {item.detail}" for item in found if item.state != "ok"}


def test_a_site_and_a_coordinator_without_a_fault_have_none(trial: Trial) -> None:
    assert faults(trial.party()) == {}
    # That a loopback address is for one machine alone is all there is to say.
    assert list(faults(trial.project())) == ["server name"]


# Kit, key and certificates


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)


def test_each_changed_file_of_a_kit_is_named(trial: Trial) -> None:
    damage(trial.north / "kit/cert.pem")
    damage(trial.north / "kit/roster/east.pem")
    (trial.north / "kit/roster/server.pem").unlink()
    details = [item.detail for item in trial.party() if item.name == "kit of north" and item.state == "fault"]
    assert len(details) == 3
    for name, words in (("cert.pem", "changed"), ("roster/east.pem", "changed"), ("roster/server.pem", "missing")):
        assert any(name in detail and words in detail for detail in details)


@pytest.mark.parametrize(
    ("spoil", "name", "code"),
    [
        (lambda site: (site / "key.pem").chmod(0o644), "kit of north", "KEY_EXPOSED"),
        (lambda site: (site / "key.pem").unlink(), "kit of north", "BAD_KEY"),
        (lambda site: shutil.rmtree(site / "kit"), "kit of north", "KIT_MISSING"),
        (lambda site: (site / "authority.pin").unlink(), "kit of north", "AUTHORITY_UNCONFIRMED"),
        (lambda site: (site / "authority.pin").write_text(f"sha256:{'0' * 64}\n"), "kit of north", "AUTHORITY_CHANGED"),
        (lambda site: (site / "kit/more.txt").write_text("x"), "kit of north", "KIT_DAMAGED"),
        (lambda site: damage(site / "kit/kit.json"), "kit of north", "KIT_DAMAGED"),
    ],
)
def test_a_kit_or_key_that_is_not_as_it_should_be(
    trial: Trial, spoil: Callable[[Path], Any], name: str, code: str
) -> None:
    spoil(trial.north)
    assert f"[{code}]" in faults(trial.party())[name]


def test_two_faults_are_both_named(trial: Trial) -> None:
    damage(trial.north / "kit/cert.pem")
    (trial.north / "key.pem").chmod(0o640)
    found = faults(trial.party())
    assert "KIT_DAMAGED" in found["kit of north"] and "0640" in found["key of north"]


def test_the_kit_of_another_party_is_no_kit(trial: Trial) -> None:
    shutil.rmtree(trial.north)
    shutil.copytree(trial.root / "site-east", trial.north)
    assert "kit of `east`" in faults(trial.party())["kit of north"]


@pytest.mark.parametrize(
    ("days", "state", "words"),
    [((-9, -1), "fault", "CERT_EXPIRED"), ((1, 9), "fault", "CERT_NOT_YET_VALID"), ((-2, 9), "warn", "8 days left")],
)
def test_certificates_by_their_days(trial: Trial, days: tuple[int, int], state: str, words: str) -> None:
    trial.plant(certificate=made_certificate(trial.authority, load_key(trial.north / "key.pem"), "north", days=days))
    found = faults(trial.party())
    (said,) = found.values()
    assert said.startswith(state) and words in said


def test_a_party_file_with_a_typo(trial: Trial) -> None:
    trial.party_file.write_text("name: north\ndata: {train: x}\ndevcie: cpu\n")
    assert "UNKNOWN_KEY" in faults(trial.party())["party file"]


# Clock


def test_a_clock_behind_the_kits_date(trial: Trial) -> None:
    trial.plant(issued=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=3))
    assert "at least 3.0 hours behind the coordinator's" in faults(trial.party())["clock"]


def test_a_clock_that_was_set_back(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    future = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=11)).isoformat(timespec="milliseconds")
    monkeypatch.setattr("fedllm.runs.audit_log._now", lambda: future)
    AuditLog(trial.north / "audit.jsonl", actor="north").append("kit_opened")
    assert "11 minutes behind what it was" in faults(trial.party())["clock"]


@pytest.mark.parametrize(("said", "state"), [("no\n", "warn"), ("yes\n", "ok"), ("", "ok")])
def test_a_clock_that_nothing_keeps_right(trial: Trial, monkeypatch: pytest.MonkeyPatch, said: str, state: str) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: SimpleNamespace(stdout=said))
    (clock,) = (item for item in trial.party() if item.name == "clock")
    assert clock.state == state
    # What was not checked is not claimed.
    assert state == "warn" or "not compared with the server's" in clock.detail


# Site and machine


def test_a_broken_audit_log(trial: Trial) -> None:
    log = AuditLog(trial.north / "audit.jsonl", actor="north")
    log.append("kit_opened")
    log.append("kit_opened")
    log.path.write_bytes(b"".join(log.path.read_bytes().splitlines(keepends=True)[1:]))
    assert "AUDIT_BROKEN" in faults(trial.party())["audit log"]


def test_a_device_that_is_not_there(trial: Trial) -> None:
    trial.party_file.write_text("name: north\ndata: {train: x}\ndevice: 'cuda:63'\n")
    assert "cuda:63" in faults(trial.party())["device"]


@pytest.mark.parametrize(("version", "words"), [(None, "not installed"), ("2.8.1", "2.8.1, and ==2.9.* is needed")])
def test_an_engine_that_is_missing_or_of_another_version(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, version: str | None, words: str
) -> None:
    def found(name: str) -> str:
        if version is None:
            raise doctor.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(doctor, "version", found)
    assert words in faults(trial.party())["nvflare"]


def test_the_engine_that_is_looked_for_is_the_one_that_the_extra_asks_for() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'flare = ["nvflare{doctor.ENGINE}"]' in text


def test_versions_that_differ_from_the_constraints(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text(f"# exact\nnot-installed==1\npytest=={pytest.__version__}\n")
    assert doctor.constrained(file)[0].state == "ok"
    file.write_text("pytest==0.1\n")
    assert doctor.constrained(file)[0].state == "warn"
    file.write_text("torch==0.1\npytest==0.1\n")
    (found,) = doctor.constrained(file)
    assert found.state == "fault" and "torch" in found.detail and "instead of 0.1" in found.detail
    with pytest.raises(ConfigError):
        doctor.constrained(tmp_path / "absent.txt")


# Coordinator


def test_a_port_that_somebody_else_has(trial: Trial) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))  # noqa: S104  (the server binds there, too)
        other.listen()
        port = other.getsockname()[1]
        trial.project_file.write_text(trial.project_file.read_text().replace("8002", str(port)))
        said = faults(trial.project())["port"]
        assert f"port {port} cannot be used" in said
        with held(trial.coordinator.site / "state" / SUPERVISOR_LOCK):
            # The project's own server may have it.
            assert "port" not in faults(trial.project())


def test_an_address_that_the_kits_do_not_have(trial: Trial) -> None:
    trial.project_file.write_text(trial.project_file.read_text().replace("8002", "8003"))
    assert "127.0.0.1:8003, the kits 127.0.0.1:8002" in faults(trial.project())["address"]


@pytest.mark.parametrize(
    ("parties", "state", "words"),
    [("north, east, south", "warn", "not on it yet: south"), ("north", "fault", "no more: east")],
)
def test_a_roster_that_is_not_that_of_the_project(trial: Trial, parties: str, state: str, words: str) -> None:
    trial.project_file.write_text(trial.project_file.read_text().replace("north, east", parties))
    said = faults(trial.project())["roster"]
    assert said.startswith(state) and words in said


def test_a_name_that_nobody_knows(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any) -> list[Any]:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "does not know the name" in faults(trial.project())["server name"]


@pytest.mark.parametrize(
    ("spoil", "name", "words"),
    [
        (lambda root: (root.authority / "ca.key").chmod(0o604), "authority", "KEY_EXPOSED"),
        (lambda root: (root.authority / "ca.pem").unlink(), "authority", "AUTHORITY_MISSING"),
        (lambda root: (root.site / "key.pem").chmod(0o660), "kit of server", "KEY_EXPOSED"),
        (lambda root: damage(root.admin / "kit/cert.pem"), "kit of admin", "KIT_DAMAGED"),
    ],
)
def test_what_a_coordinator_must_keep(
    trial: Trial, spoil: Callable[[CoordinatorFolder], Any], name: str, words: str
) -> None:
    spoil(trial.coordinator)
    assert words in faults(trial.project())[name]


# What a job needs


@pytest.fixture
def federation(tmp_path: Path, base: Path, original: Path) -> TinyFederation:
    made = tiny_federation(tmp_path / "job", base, sizes={"north": 6, "east": 5})
    shutil.copytree(original / "site-north", tmp_path / "job/parties/site-north")
    return made


def test_a_job_is_looked_at_at_one_site(federation: TinyFederation, base: Path) -> None:
    party = federation.folder / "parties/north.yaml"
    found = examine_job(federation.job(), party)
    assert list(faults(found)) == ["approval"] and "NOT_APPROVED" in faults(found)["approval"]
    digests = {item.name: item.detail for item in found if item.name.endswith("digest")}
    assert set(digests) == {"base digest", "tokenizer digest", "template digest"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.base_digest": "0" * 64}, "MODEL_MISMATCH"),
        ({"model.model_name_or_path": "./nowhere"}, "MODEL_NOT_FOUND"),
        ({"peft.target_modules": ["nothing"]}, "PEFT_TARGET"),
    ],
)
def test_a_job_that_does_not_fit_the_site(tmp_path: Path, base: Path, change: dict[str, Any], words: str) -> None:
    made = tiny_federation(tmp_path, base, sizes={"north": 6, "east": 5}, job=change)
    assert words in faults(examine_job(made.job(), made.folder / "parties/north.yaml"))["job"]


def test_data_and_limits_that_stand_against_a_job(tmp_path: Path, base: Path) -> None:
    made = tiny_federation(tmp_path, base, sizes={"north": 6, "east": 5}, party={"limits.max_rounds": 1})
    assert "POLICY_REFUSED" in faults(examine_job(made.job(), made.folder / "parties/north.yaml"))["job"]
    other = tiny_federation(tmp_path / "other", base, sizes={"north": 6, "east": 5})
    (other.folder / "data/north.jsonl").unlink()
    assert "DATA_NOT_FOUND" in faults(examine_job(other.job(), other.folder / "parties/north.yaml"))["job"]


def test_a_machine_too_small_for_the_model(federation: TinyFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    found = faults(examine_job(federation.job(), federation.folder / "parties/north.yaml"))
    assert "GB of weights" in found["model memory"]


def test_a_job_with_strangers_or_without_a_model_at_the_coordinator(trial: Trial, tmp_path: Path, base: Path) -> None:
    made = tiny_federation(tmp_path / "job", base, sizes={"north": 6, "west": 5})
    found = examine_submission(made.job(), trial.project_file)
    assert "west" in faults(found)["parties"] and "base model" not in faults(found)
    change = {"model.model_name_or_path": "./nowhere"}
    made = tiny_federation(tmp_path / "other", base, sizes={"north": 6, "east": 5}, job=change)
    assert list(faults(examine_submission(made.job(), trial.project_file))) == ["base model"]


# The way to the server


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Serve connections on loopback, each with a function; give the port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, suppress(OSError, ValueError):
                        connection.settimeout(5)
                        answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        # Closing alone would leave `accept` waiting.
        server.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Shown:
    """What a TLS server shows, and whom it trusts."""

    certificate: bytes
    key: Path
    trusts: Path
    newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3


@contextmanager
def tls(shown: Shown, folder: Path) -> Iterator[int]:
    (folder / "shown.pem").write_bytes(shown.certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = shown.newest
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(shown.trusts)
    context.load_cert_chain(folder / "shown.pem", shown.key)

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as made:
            made.read(1)

    with listening(answer) as port:
        yield port


def the_fault(trial: Trial, port: int, *, timeout_s: float = 5.0) -> str:
    *before, last = reach(trial.kit(port=port), timeout_s=timeout_s)
    assert [item.state for item in before] == ["ok"] * len(before)
    assert last.state == "fault" and last.fix
    return f"{last.name}: {last.detail}"


@pytest.fixture
def site(trial: Trial) -> Path:
    return trial.coordinator.site


def own(trial: Trial) -> Shown:
    site = trial.coordinator.site
    return Shown((site / "kit/cert.pem").read_bytes(), site / "key.pem", site / "kit/ca.pem")


def test_the_projects_own_server_is_reached(trial: Trial, tmp_path: Path) -> None:
    with tls(own(trial), tmp_path) as port:
        found = reach(trial.kit(port=port))
    assert [item.state for item in found] == ["ok", "ok"] and "TLSv1.3" in found[1].detail


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"days": (-9, -1)}, "the server's certificate has expired"),
        ({"days": (1, 9)}, "not valid yet"),
        ({"host": "127.0.0.2"}, "for another address"),
        ({"host": "fl.example.org"}, "for another address"),
        ({}, "another certificate than this site's kit lists"),
    ],
)
def test_a_server_with_a_wrong_certificate_of_the_right_authority(
    trial: Trial, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    key = trial.coordinator.site / "key.pem"
    certificate = made_certificate(trial.authority, load_key(key), "server", **change)
    with tls(Shown(certificate, key, trial.coordinator.site / "kit/ca.pem"), tmp_path) as port:
        assert words in the_fault(trial, port)


def test_a_server_of_another_authority(trial: Trial, stranger: Trial, tmp_path: Path) -> None:
    with tls(own(stranger), tmp_path) as port:
        assert "server by TLS" in (said := the_fault(trial, port)) and "of another authority" in said


def test_a_server_that_does_not_know_our_authority(trial: Trial, stranger: Trial, tmp_path: Path) -> None:
    shown = own(trial)
    other = Shown(shown.certificate, shown.key, stranger.coordinator.site / "kit/ca.pem")
    with tls(other, tmp_path) as port:
        assert "does not know the authority of this site's certificate" in the_fault(trial, port)


def test_a_certificate_of_ours_that_the_server_finds_expired(trial: Trial, tmp_path: Path) -> None:
    expired = made_certificate(trial.authority, load_key(trial.north / "key.pem"), "north", days=(-9, -1))
    kit = trial.kit()
    with tls(own(trial), tmp_path) as port:
        (trial.north / "kit/cert.pem").write_bytes(expired)
        found = reach(Kit(**{**vars(kit), "port": port}))
    assert "has expired, the server says" in found[-1].detail


def test_a_server_without_tls_1_3(trial: Trial, tmp_path: Path) -> None:
    shown = own(trial)
    old = Shown(shown.certificate, shown.key, shown.trusts, ssl.TLSVersion.TLSv1_2)
    with tls(old, tmp_path) as port:
        assert "no TLS 1.3" in the_fault(trial, port)


def say_http(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    connection.recv_into(bytearray(4096))


def echo(connection: socket.socket) -> None:
    data = bytearray(4096)
    connection.sendall(data[: connection.recv_into(data)])


def say_nothing(connection: socket.socket) -> None:
    threading.Event().wait(3)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (say_http, "no TLS"),
        (echo, "TLS"),
        (say_nothing, "says nothing: no TLS"),
        (lambda connection: None, "within the handshake"),
    ],
    ids=["http", "echo", "silence", "closing"],
)
def test_what_listens_there_is_no_tls(trial: Trial, answer: Callable[[socket.socket], None], words: str) -> None:
    with listening(answer) as port:
        said = the_fault(trial, port, timeout_s=1.0)
    assert said.startswith("server by TLS") and words in said


def test_nobody_listens(trial: Trial) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert "nobody listens there" in the_fault(trial, port)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "no answer within"),
        (socket.gaierror(), "knows no such name"),
        (OSError(101, "Network is unreachable"), "no way there: Network is unreachable"),
    ],
)
def test_no_way_to_the_server(trial: Trial, monkeypatch: pytest.MonkeyPatch, error: OSError, words: str) -> None:
    def connect(*args: Any, **more: Any) -> socket.socket:
        raise error

    monkeypatch.setattr(socket, "create_connection", connect)
    assert words in the_fault(trial, 1)


def test_a_short_key_is_named(trial: Trial) -> None:
    key = new_key(bits=1024)
    (trial.north / "key.pem").unlink()
    save_key(key, trial.north / "key.pem")
    assert "WEAK_KEY" in faults(trial.party())["kit of north"]
