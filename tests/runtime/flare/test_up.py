"""`fedllm up`: real processes, mutual TLS; the same adapter as in one process, whatever is killed on the way."""

from __future__ import annotations

import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deployed import Deployed, deployed
from safetensors.torch import load
from tiny import THOROUGH, TinyFederation, thorough
from typer.testing import CliRunner

from fedllm.cli import app
from fedllm.ownership.log import FOLDER
from fedllm.ownership.log import read_log as read_claims_log
from fedllm.runs.audit_log import read_log
from fedllm.runs.audit_verify import verify_log
from fedllm.runtime.ownership import commit

pytest.importorskip("nvflare")
from fedllm.runtime.flare.door import SOCKETS

Make = Callable[..., TinyFederation]
PLAN: dict[str, Any] = {
    "federation.num_rounds": 6,
    "federation.strategy": {"name": "FedAvgM", "server_momentum": 0.6},
    "federation.keep": "last",
    "peft.lora_dropout": 0.1,
    "train.local_steps": 60,
}
CLAIMED: dict[str, Any] = {"ownership": {"carrier": "product", "claimants": ["north", "south"]}}
pytestmark = pytest.mark.processes
LOGS = ("coordinator/site", "site-north", "site-south")
KILLS = {2: "client job", 3: "server job", 4: "client parent", 5: "server parent"}
KILLS = KILLS if THOROUGH else {2: "client job", 3: "server parent"}


@pytest.mark.first
@pytest.mark.timeout(600)
def test_kills_of_each_process_are_recovered_from_without_a_person_and_change_nothing(make_federation: Make) -> None:
    # Both parties claim the model, so its log of commitments lives through the kills too.
    federation = make_federation(sizes={"north": 6, "south": 5}, job=PLAN | CLAIMED)
    claims = [path for path, _ in commit(federation.job(), federation.parties())]
    expected = federation.run("unbroken").adapter_sha256
    with deployed(federation.job_file, federation.folder / "up") as up:
        for number, what in KILLS.items():
            up.wait_for(lambda number=number: (number, "begin") in up.journal())
            up.kill(what)
        assert up.end() == 0
        assert up.verdict()["adapter_sha256"] == expected
        assert up.verdict()["status"] == "SUCCESS"
        commits = [number for number, step in up.journal() if step == "commit"]
        assert commits == list(range(7))
        begun = [number for number, step in up.journal() if step == "begin"]
        assert len(begun) > len(commits)
        assert wait_until_none(up.processes)
        for name in LOGS:
            others = [up.root / other / "audit.jsonl" for other in LOGS if other != name]
            assert verify_log(up.root / name / "audit.jsonl", others) == []
        noted = [entry for _, _, entry in read_log(up.root / "site-north" / "audit.jsonl") if entry]
        assert {entry.peer for entry in noted if entry.event == "peer_head"} == {"server", "south"}
        check_claims(up, claims)


def check_claims(up: Deployed, claims: list[Path]) -> None:
    """Check that all signed the log each round, and that it bears out the claims with any party's own copy of it."""
    heads = read_claims_log(up.run / FOLDER).heads
    assert {signed.head.round for signed in heads} == set(range(7))
    assert all(signed.signatures.keys() == {"north", "south"} for signed in heads)
    for party, claim in zip(("north", "south"), claims, strict=True):
        (copy,) = (up.root / f"site-{party}").glob(f"state/runs/*/parties/{party}/{FOLDER}")
        words = ("ownership", "verify", up.run, "--claim", claim, "--log", copy)
        answer = CliRunner().invoke(app, [str(word) for word in words])
        assert answer.exit_code == 0 and "32 of 32 bits" in answer.output, answer.output
    answer = CliRunner().invoke(app, ["verify", str(up.run), "--site", str(up.root / "coordinator" / "site")])
    assert answer.exit_code == 0 and "ALTERED" not in answer.output, answer.output


def wait_until_none(found: Callable[[], list[Any]], *, seconds: float = 120) -> bool:
    until = time.monotonic() + seconds
    while found():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.timeout(600)
def test_an_interrupted_run_ends_its_processes_and_goes_on_at_the_next_call(make_federation: Make) -> None:
    # Sums are secure here: each site signs with the key of its kit, and of three none may be missing.
    plan = PLAN | {
        "federation.num_rounds": 6,
        "train.local_steps": 40,
        "federation.codec": {"name": "Grid", "limit": 0.5},
    }
    sizes = {"north": 6, "south": 5, "east": 4}
    expected = make_federation("open", sizes=sizes, job=plan).run("unbroken").adapter_sha256
    secure = {"privacy.secure_aggregation": {"enabled": True}}
    federation = make_federation(sizes=sizes, job=plan | secure)
    with deployed(federation.job_file, federation.folder / "up") as up:
        up.wait_for(lambda: (1, "begin") in up.journal())
        # Processes of a machine meet where only their user can enter.
        sockets = Path(up.find("server parent").environ()[SOCKETS])
        assert stat.S_IMODE(sockets.stat().st_mode) == stat.S_IRWXU
        assert list(sockets.iterdir())
        up.process.send_signal(signal.SIGINT)
        assert up.end() == 130
        assert wait_until_none(up.processes)
        assert not sockets.exists()
        assert up.verdict()["status"] == "PAUSED"
        before = up.journal()
    with deployed(federation.job_file, federation.folder / "up") as again:
        assert again.end() == 0
        assert again.verdict()["adapter_sha256"] == expected
        assert again.journal()[: len(before)] == before
        noted = [entry for _, _, entry in read_log(again.root / "site-east" / "audit.jsonl") if entry]
        kinds = {entry.kind for entry in noted if entry.event == "operation"}
        assert "Masked" in kinds and "Summand" not in kinds


@thorough
@pytest.mark.timeout(600)
def test_a_party_s_own_factor_survives_its_process_and_is_in_no_file_of_the_coordinator(
    make_federation: Make,
) -> None:
    plan = PLAN | {"federation.lora_rule": "FedSA-LoRA", "federation.num_rounds": 3}
    federation = make_federation(sizes={"north": 6, "south": 5}, job=plan)
    expected = own_adapters(federation.run("unbroken").path)
    with deployed(federation.job_file, federation.folder / "up") as up:
        up.wait_for(lambda: (2, "begin") in up.journal())
        up.kill("client job")
        assert up.end() == 0
        assert up.verdict()["status"] == "SUCCESS" and up.verdict()["adapter_sha256"] is None
        for party in ("north", "south"):
            assert own_adapters(up.root / f"site-{party}") == {party: expected[party]}
        assert own_adapters(up.root / "coordinator") == {}
        held = [path.read_bytes() for path in (up.root / "coordinator").rglob("*") if path.is_file()]
    for file in expected.values():
        factors = {name: tensor.numpy().tobytes() for name, tensor in load(file).items()}
        assert not any(data in one for name, data in factors.items() if "lora_B" in name for one in held)
        # What is shared would be found like that.
        assert all(any(data in one for one in held) for name, data in factors.items() if "lora_A" in name)


def own_adapters(folder: Path) -> dict[str, bytes]:
    files = folder.rglob("parties/*/adapter/adapter_model.safetensors")
    return {file.parts[-3]: file.read_bytes() for file in files}
