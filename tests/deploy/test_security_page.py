"""The page for a security reviewer says what is there: its tests exist, its messages and settings are the code's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import CODES
from fedllm.identity.keys import new_key
from fedllm.identity.kit import open_kit
from fedllm.job.project import Project, ServerAddress
from fedllm.runtime.base import HANDSHAKE
from fedllm.runtime.flare.transport import LocalDriver, TlsDriver
from fedllm.runtime.flare.workspace import write_workspace
from fedllm.runtime.package_messages import PACKAGE_KINDS
from fedllm.runtime.provision import provision_all
from fedllm.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "security-between-machines.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(tests/[^`]+)`", PAGE))
    assert len(named) >= 6
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_every_code_that_is_named_exists() -> None:
    assert set(re.findall(r"`([A-Z]+_?[A-Z_]{4,})`", section("What is verified, and when"))) - set(CODES) == set()


def test_every_message_is_in_the_table_and_no_other() -> None:
    text = section("What leaves a machine")
    named = set(re.findall(r"^\| `(\w+)`", text, re.M)) | set(re.findall(r"^\| `\w+` / `(\w+)`", text, re.M))
    around = set(HANDSHAKE) | set(PACKAGE_KINDS)
    assert named == around | {kind for line in SCENARIOS.values() for kind in line.kinds()}


def test_the_page_knows_how_long_keys_are() -> None:
    assert f"RSA keys of {new_key().key_size} bits" in PAGE


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What FLARE reads at the server and at a party: file name -> content."""
    root = tmp_path_factory.mktemp("project")
    project = Project(name="demo", server=ServerAddress(host="fl.example.org", port=8002), parties=["north"])
    provision_all(root / "coordinator", project, {"north": root / "site-north"})
    found = {}
    for name, site, admin in (
        ("server", root / "coordinator" / "site", root / "coordinator" / "admin"),
        ("north", root / "site-north", None),
    ):
        place = site / "state" / "flare"
        place.mkdir(parents=True)
        write_workspace(open_kit(site), place, admin=admin)
        files = [*place.glob("local/*.json"), *place.glob("startup/*.json")]
        found[name] = {path.name: json.loads(path.read_text()) for path in files} | {"place": place}
    return found


@pytest.mark.parametrize("site", ["server", "north"])
def test_what_the_page_says_is_off_is_off(site: str, workspaces: dict[str, dict[str, Any]]) -> None:
    files = workspaces[site]
    resources = files["resources.json"]
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert resources["class_allow_list"] == ["fedllm.runtime.flare."]
    assert files["comm_config.json"]["allow_adhoc_conns"] is False
    granted = {
        (role, right)
        for role, rights in files["authorization.json"]["permissions"].items()
        for right, to_whom in rights.items()
        if to_whom != "none"
    }
    assert granted == (set() if site == "server" else {("project_admin", "submit_job")})
    listed = re.search(r"rights to log in: ([a-z, ]+)", section("What of FLARE is off"))
    words = "/".join(files["authorization.json"]["permissions"]["project_admin"])
    assert [word for word in listed[1].split(", ") if word.strip() not in words] == []


def test_a_site_streams_no_log_and_keeps_no_state_elsewhere(workspaces: dict[str, dict[str, Any]]) -> None:
    assert workspaces["north"]["resources.json"]["allow_log_streaming"] is False
    server = workspaces["server"]
    kept = json.dumps([server["resources.json"]["snapshot_persistor"], server["resources.json"]["components"]])
    roots = re.findall(r'"(?:root_dir|uri_root)": "([^"]+)"', kept)
    assert roots and all(root == "/" or Path(root).is_relative_to(server["place"]) for root in roots)


def test_both_transports_are_those_of_fedllm(workspaces: dict[str, dict[str, Any]]) -> None:
    for site, file in (("server", "fed_server.json"), ("north", "fed_client.json")):
        communication = workspaces[site]["comm_config.json"]
        assert Path(communication["comm_driver_path"]) == ROOT / "src" / "fedllm" / "runtime" / "flare" / "drivers"
        (server,) = workspaces[site][file]["servers"]
        assert server["service"]["scheme"] in TlsDriver.supported_transports()
        assert communication["internal"]["scheme"] in LocalDriver.supported_transports()
