"""What a site does with a job that arrives: it is opened only as it was approved, and refused with a code otherwise."""

from __future__ import annotations

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


def test_a_site_keeps_what_is_spent_in_its_own_folder(north: OneSite) -> None:
    with north.party_file.open("a") as file:
        file.write("limits:\n  require_approval: false\n  max_epsilon: 3.0\n")
    asked = {"unit": "example", "epsilon": 2.0}
    party = north.open(privacy__differential_privacy=asked)
    assert isinstance(party, Member)
    try:
        client = party.host.open_client(lambda *row: None)
        budget = client._c.budget  # type: ignore[attr-defined]
        assert (budget._purse.folder, budget._purse.max_epsilon) == (north.site / "privacy", 3.0)
    finally:
        party.close()
    assert north.open(privacy__differential_privacy=asked | {"epsilon": 4.0}) == Refusal("POLICY_REFUSED")
