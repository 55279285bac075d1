"""`fedllm ownership` as a user types it."""

from __future__ import annotations

import importlib.util
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tiny import TinyFederation, tiny_federation
from verbs import Call, data_of

from fedllm.errors import ExitCode
from fedllm.ownership.claims import load_claim, new_secret
from fedllm.runtime.ownership import commit

TWO = {"north": 6, "south": 4}
JOB = {
    "federation.num_rounds": 2,
    "federation.keep": "last",
    "train.local_steps": 3,
    "peft.target_modules": "all-linear",
    "ownership": {"carrier": "product", "claimants": ["north", "south"]},
}


@pytest.fixture
def federation(tmp_path: Path, base: Path) -> TinyFederation:
    return tiny_federation(tmp_path, base, sizes=TWO, job=JOB)


def something_stamped(folder: Path, digest: str) -> Path:
    """Return a file that may be attached: whatever holds the digest may, and who verifies has to look."""
    path = folder / "stamp.tsr"
    path.write_bytes(b"of today: " + bytes.fromhex(digest))
    return path


def test_a_claim_is_committed_to_and_verified(call: Call, federation: TinyFederation, tmp_path: Path) -> None:
    folder = federation.folder
    code, out, _ = call("ownership", "commit", federation.job_file, "--party", folder / "parties" / "north.yaml")
    assert code == 0 and "secret" in out
    code, _, err = call("run", federation.job_file, "-o", folder / "run", "-q")
    assert code == ExitCode.USAGE and "OWNERSHIP_UNCOMMITTED" in err
    code, out, _ = call(
        "ownership", "commit", federation.job_file, "--party", folder / "parties" / "south.yaml", "--json"
    )
    (south,) = data_of(out)
    assert code == 0 and south["party"] == "south" and load_claim(Path(south["claim"])).salt not in out
    words = ("--party", folder / "parties" / "south.yaml", "--stamp", something_stamped(tmp_path, south["digest"]))
    assert call("ownership", "commit", federation.job_file, *words)[0] == 0
    assert call("run", federation.job_file, "-o", folder / "run", "-q")[0] == 0

    own = folder / "parties" / "ownership-north"
    code, out, _ = call("ownership", "verify", folder / "run", "--claim", own, "--log", folder / "run")
    assert code == 0 and "32 of 32 bits" in out and "The claim is upheld" in out
    assert "by the word of those who signed the log" in out
    strict = call(
        "ownership", "verify", folder / "run", "--claim", own, "--log", folder / "run", "--threshold", "1e-12"
    )
    assert strict[0] == ExitCode.FAILED and "the threshold is 1e-12" in strict[1]
    code, out, _ = call("ownership", "verify", folder / "run", "--claim", own, "--json")
    (found,) = data_of(out)
    assert code == ExitCode.FAILED and '"status": "not upheld"' in out
    assert found["status"] == "rejected" and "no log is given" in found["sentence"]
    words = ("--claim", own, "--log", folder / "run", "--seen", "2020-01-01")
    code, out, _ = call("ownership", "verify", folder / "run", *words)
    assert code == ExitCode.FAILED and "was seen on 2020-01-01" in out
    # Where its bits are is said by the log.
    assert not found["readings"]
    key = call("ownership", "verify", folder / "run", *words[:4], "--party-key", "south=sha256:" + "0" * 64)
    assert key[0] == ExitCode.FAILED and "log's key of `south`" in key[1]

    # A claim that was changed is still a claim, but not the one that was committed to.
    changed = load_claim(next(own.glob("*.claim.json"))).model_copy(update={"salt": new_secret()})
    path = tmp_path / "changed.claim.json"
    path.write_text(changed.model_dump_json(), encoding="utf-8")
    path.chmod(0o600)
    code, out, _ = call("ownership", "verify", folder / "run", "--claim", path, "--log", folder / "run")
    assert code == ExitCode.FAILED and "rejected" in out and "salt" in out


def test_a_stamp_is_verified_with_the_certificates_that_are_named(
    call: Call, federation: TinyFederation, tmp_path: Path
) -> None:
    job, parties = federation.job(), federation.parties()
    ((_, made),) = commit(job, parties[1:])
    commit(job, parties[1:], stamp=something_stamped(tmp_path, made.digest))
    commit(job, parties[:1])
    folder, words = federation.run().path.parent, ("--claim", tmp_path / "parties" / "ownership-south")
    code, out, _ = call("ownership", "verify", folder / "run", *words, "--log", folder / "run")
    assert code == 0 and "its chain was NOT verified" in out
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]), datetime.now(UTC)
    root = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
    pem = root.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (tmp_path / "root.pem").write_bytes(pem)
    more = ("--log", folder / "run", "--tsa-certificate", tmp_path / "root.pem")
    code, out, err = call("ownership", "verify", folder / "run", *words, *more)
    if importlib.util.find_spec("rfc3161_client") is None:
        assert code == ExitCode.RESOURCES and "fedllm[stamps]" in err
    else:
        assert code == ExitCode.FAILED and "rejected" in out and "no answer of a time stamping authority" in out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("verify", "run", "--claim", "nothing.json"), "BAD_KEY"),
        (("verify", "run", "--claim", "nothing.json", "--seen", "soon"), "BAD_VALUE"),
        (("verify", "run", "--claim", "nothing.json", "--party-key", "north"), "BAD_VALUE"),
        (("verify", "run", "--claim", "."), "FILE_NOT_FOUND"),
    ],
)
def test_wrong_words_are_explained(
    words: tuple[str, ...], code: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert code in call("ownership", *words)[2]
