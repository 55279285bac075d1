"""What a site does with a job that arrives: it is opened only as it was approved, and refused with a code otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_channel import Air
from tiny import TinyFederation

from fedllm.identity.files import KEY_FILE
from fedllm.identity.keys import load_key
from fedllm.identity.signing import Signer
from fedllm.job.approval import approve
from fedllm.job.project import Project
from fedllm.privacy.accountant import Mechanism
from fedllm.privacy.budget import Budget
from fedllm.privacy.terms import Terms
from fedllm.runs.audit_log import AUDIT_FILE, read_log
from fedllm.runs.jsonl import write_json
from fedllm.runtime.flare.desk import Desk
from fedllm.runtime.flare.party import Member, Refusal, open_party
from fedllm.runtime.provision import provision_all

Make = Callable[..., TinyFederation]
RUN_ID = "0" * 32
PROJECT = Project.model_validate(
    {"name": "trial", "server": {"host": "127.0.0.1", "port": 1}, "parties": ["north", "south"]}
)


@dataclass
class OneSite:
    """The site of north, and the job as it was approved there."""

    site: Path
    job: dict[str, Any]
    party_file: Path

    def open(self, **changes: Any) -> Any:
        asked = self.job
        for path, value in changes.items():
            *sections, key = path.split("__")
            target = asked = {name: dict(item) if isinstance(item, dict) else item for name, item in asked.items()}
            for section in sections:
                target = target[section]
            target[key] = value
        return open_party(self.site, asked, RUN_ID, Desk(Air().channel("north", ["server"])))


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sites of a project; only to be copied."""
    root = tmp_path_factory.mktemp("kits")
    provision_all(root / "coordinator", PROJECT, {name: root / f"site-{name}" for name in PROJECT.parties})
    return root


@pytest.fixture
def north(make_federation: Make, kits: Path, tmp_path: Path) -> OneSite:
    federation = make_federation(sizes={"north": 5, "south": 4})
    site = Path(shutil.copytree(kits / "site-north", tmp_path / "site-north"))
    job, party = federation.job(), federation.parties()[0].party
    approve(job, party, signer=Signer(load_key(site / KEY_FILE)), folder=site, project=PROJECT.name)
    (site / "state").mkdir(exist_ok=True)
    party_file = federation.folder / "parties" / "north.yaml"
    write_json(site / "state" / "site.json", {"party_file": str(party_file)})
    return OneSite(site, job.model_dump(mode="json"), party_file)


def is_opened(party: Any) -> bool:
    party.close()
    return isinstance(party, Member)


def test_the_job_that_was_approved_is_opened(north: OneSite) -> None:
    assert is_opened(north.open())


@pytest.mark.parametrize(
    "change",
    [
        {"train__learning_rate": 0.02},
        {"parties": ["north", "south", "west"]},
        {"federation__num_rounds": 3},
        {"seed": 8},
        {"peft__r": 4},
    ],
)
def test_a_job_changed_after_approval_is_refused(north: OneSite, change: dict[str, Any]) -> None:
    assert north.open(**change) == Refusal("NOT_APPROVED")


def test_a_changed_job_is_opened_where_the_site_asks_for_no_approval(north: OneSite) -> None:
    base = north.job["model"]["model_name_or_path"]
    assert Path(base).is_absolute()
    with north.party_file.open("a") as file:
        file.write("limits:\n  require_approval: false\n")
    assert is_opened(north.open(train__learning_rate=0.02))


def test_an_approval_ends_when_the_sites_limits_change(north: OneSite) -> None:
    with north.party_file.open("a") as file:
        file.write("limits:\n  max_rounds: 100\n")
    assert north.open() == Refusal("NOT_APPROVED")


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ("max_rounds: 1", "POLICY_REFUSED"),
        ("min_parties: 5", "POLICY_REFUSED"),
        ("allowed_methods: [IA3]", "POLICY_REFUSED"),
        ("require_secure_aggregation: true", "POLICY_REFUSED"),
        ("max_epsilon: 1.0", "POLICY_REFUSED"),
    ],
)
def test_a_job_beyond_the_sites_limits_is_refused(north: OneSite, limits: str, code: str) -> None:
    with north.party_file.open("a") as file:
        file.write(f"limits:\n  {limits}\n")
    assert north.open() == Refusal(code)


@pytest.mark.parametrize(
    "change",
    [
        {"parties": ["east", "south"]},
        {"train__learning_rate": "high"},
        {"unheard_of": 1},
        {"model__trust_remote_code": True},
    ],
)
def test_a_job_that_is_not_for_this_site_or_not_valid_is_refused(north: OneSite, change: dict[str, Any]) -> None:
    assert isinstance(north.open(**change), Refusal)


def test_an_update_beyond_the_sites_limit_is_refused_before_anything_is_trained(north: OneSite) -> None:
    with north.party_file.open("a") as file:
        file.write("limits:\n  require_approval: false\n  max_upload_bytes_per_round: 100\n")
    assert north.open() == Refusal("POLICY_REFUSED")


def test_a_site_with_a_damaged_kit_takes_part_in_nothing(north: OneSite) -> None:
    path = north.site / "kit" / "roster" / "south.pem"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    assert isinstance(north.open(), Refusal)


TERMS = Terms("example", "d" * 64, Mechanism(0.1, 3.0, 5), 1e-5, "RDP", 2.0)


def budget_of(party: Any) -> Budget:
    found: Budget = party.host.open_client(lambda *row: None)._c.budget
    return found


def test_a_site_s_audit_log_remembers_what_its_ledger_forgets(north: OneSite) -> None:
    with north.party_file.open("a") as file:
        file.write("limits:\n  require_approval: false\n  max_epsilon: 3.0\n")
    asked = {"unit": "example", "epsilon": 2.0}
    assert north.open(privacy__differential_privacy=asked | {"epsilon": 4.0}) == Refusal("POLICY_REFUSED")
    party = north.open(privacy__differential_privacy=asked)
    budget_of(party).open_round(1, "inputs", TERMS)
    party.close()
    ledger = north.site / "privacy" / "north.jsonl"
    (line,) = (json.loads(row) for row in ledger.read_text().splitlines())
    noted = [entry for _, _, entry in read_log(north.site / AUDIT_FILE) if entry and entry.event == "privacy_spent"]
    assert [(entry.digest, entry.round, entry.run_id) for entry in noted] == [(line["hash"], 1, RUN_ID)]
    assert is_opened(north.open(privacy__differential_privacy=asked))
    # Ledger, head and the run's own note are gone: a new run would know of nothing.
    shutil.rmtree(north.site / "privacy")
    shutil.rmtree(north.site / "state" / "runs")
    assert north.open(privacy__differential_privacy=asked) == Refusal("LEDGER_BROKEN")
