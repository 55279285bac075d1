"""`fedllm ownership ask`, `fingerprint` and `trace`: what is printed, and the exit codes."""

from pathlib import Path

import pytest
from tiny import tiny_federation
from verbs import Call, data_of

from fedllm.errors import ExitCode
from fedllm.models.digest import base_digest, json_digest
from fedllm.ownership.claims import Claim, save_claim
from fedllm.ownership.commitments import ClaimFolder
from fedllm.ownership.triggers import make_triggers


@pytest.fixture
def claim(tmp_path: Path) -> Path:
    key = "11" * 32
    made = Claim(
        party="north",
        job_digest="ab" * 32,
        base_digest="cd" * 32,
        carrier="none",
        sites=(),
        key_seed=key,
        bits="",
        triggers=make_triggers(key, 3),
        threshold=1e-6,
        salt="ef" * 32,
    )
    save_claim(made, tmp_path / "claim.json")
    return tmp_path / "claim.json"


def test_a_leak_is_traced_to_a_party(call: Call, tmp_path: Path, base: Path) -> None:
    job = {"ownership.trace": "delivered", "federation.num_rounds": 1, "peft.target_modules": "all-linear"}
    run = tiny_federation(tmp_path, base, job=job).run().path
    copy = run / "parties" / "north" / "copy"
    code, out, _ = call("ownership", "trace", copy, "--run", run)
    assert code == 0 and "the copy is that of north" in out
    code, out, _ = call("ownership", "trace", copy, "--run", run, "--json")
    assert code == 0 and data_of(out)["named"] == ["north"]
    code, out, _ = call("ownership", "trace", run / "adapter", "--run", run)
    assert code == 0 and "undecided" in out


def test_a_model_that_was_not_marked_is_not_claimed(call: Call, base: Path, claim: Path) -> None:
    code, out, _ = call("ownership", "ask", base, "--claim", claim)
    assert code == ExitCode.FAILED
    assert "0 of 3 word for word" in out and "does not hold" in out and "passes with a chance of" in out
    code, out, _ = call("ownership", "ask", base, "--claim", claim, "--json")
    assert code == 1 and data_of(out)[0]["matches"] == 0
    # No secret text is printed.
    assert not [one for one in make_triggers("11" * 32, 3) if one.answer in out or one.prompt in out]


def test_a_suspect_must_be_named_in_one_way(call: Call, base: Path, claim: Path) -> None:
    assert call("ownership", "ask", "--claim", claim)[0] == ExitCode.USAGE
    assert call("ownership", "ask", base, "--claim", claim, "--endpoint", "http://host")[0] == ExitCode.USAGE
    code, _, err = call("ownership", "ask", "--claim", claim, "--endpoint", "http://127.0.0.1:9")
    assert code == ExitCode.RESOURCES and "ENDPOINT_FAILED" in err


def test_a_fingerprint_that_is_not_learnt_is_told(call: Call, base: Path, tmp_path: Path) -> None:
    words = ("ownership", "fingerprint", base, "-o", tmp_path / "out", "--claims", tmp_path / "claims")
    code, _, err = call(*words, "--count", "2", "--max-steps", "1")
    assert code == ExitCode.FAILED and "NO_PROGRESS" in err
    assert call(*words, "--count", "1")[0] == ExitCode.USAGE


def test_a_stamp_is_attached_to_a_fingerprint_afterwards(call: Call, base: Path, tmp_path: Path) -> None:
    words = ("ownership", "fingerprint", base, "--claims", tmp_path / "claims")
    digest = base_digest(base)
    made = Claim(
        party="owner",
        job_digest=json_digest({"fingerprint of": digest}),
        base_digest=digest,
        carrier="none",
        sites=(),
        key_seed="11" * 32,
        bits="",
        triggers=make_triggers("11" * 32, 3, form="instruction"),
        threshold=1e-6,
        salt="ef" * 32,
    )
    ClaimFolder(tmp_path / "claims").write(made)
    stamp = tmp_path / "answer.tsr"
    stamp.write_bytes(bytes.fromhex(made.commitment()))
    code, out, _ = call(*words, "--stamp", stamp)
    assert code == 0 and made.commitment() in out and "time stamp  SHA-256" in out
    code, out, _ = call(*words, "--stamp", stamp, "--json")
    assert code == 0 and data_of(out)["commitment"] == made.commitment()
    stamp.write_bytes(b"of something else")
    assert "BAD_VALUE" in call(*words, "--stamp", stamp)[2]
    assert "BAD_COMBINATION" in call(*words)[2]
    assert "BAD_COMBINATION" in call(*words, "--stamp", stamp, "-o", tmp_path / "out")[2]
