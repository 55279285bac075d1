"""deploy/compose.yaml: every service is behind its walls, and each wall that is taken away is missed."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from fedllm.job.project import Project

DEPLOY = Path(__file__).parents[2] / "deploy"
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "deploy-with-compose.md"
PARTIES = ["north", "east", "south"]
_SECRET = re.compile(r"key|secret|password|token|\.pem", re.I)


def compose() -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


def problems(file: dict[str, Any]) -> list[str]:
    """Return what is wrong with a compose file, by service."""
    found = [f"{name}: {what}" for name, service in file["services"].items() for what in walls(service, file)]
    publishing = [name for name, service in file["services"].items() if service.get("ports")]
    if publishing != ["server"]:
        found.append(f"ports are published by {publishing}")
    for name, service in file["services"].items():
        if name == "server":
            continue
        if any(not (file["networks"].get(network) or {}).get("internal") for network in service["networks"]):
            found.append(f"{name}: reaches more than the server")
        for other, its in file["services"].items():
            if other not in ("server", name) and set(its["networks"]) & set(service["networks"]):
                found.append(f"{name}: reaches {other}")
    return found


def walls(service: dict[str, Any], file: dict[str, Any]) -> list[str]:
    rules = {
        "runs as root": re.fullmatch(r"[1-9]\d*:[1-9]\d*", str(service.get("user"))),
        "root file system can be written": service.get("read_only") is True,
        "keeps capabilities": service.get("cap_drop") == ["ALL"] and not service.get("cap_add"),
        "may gain privileges": "no-new-privileges:true" in service.get("security_opt", []),
        "is privileged": not service.get("privileged"),
        "shares a namespace with the host": not any(service.get(key) for key in ("pid", "ipc", "network_mode")),
        "has no bound on memory or processes": service.get("mem_limit") and service.get("pids_limit"),
        "has no health check": service.get("healthcheck", {}).get("test", [""])[0] == "CMD",
        "has secrets in its environment": not any(map(_SECRET.search, map(str, service.get("environment", [])))),
        "keeps its state nowhere": any(
            volume.split(":")[0] in file["volumes"] and volume.split(":")[1] == "/site" for volume in service["volumes"]
        ),
        "writes to a folder of the host": all(
            volume.endswith(":ro") or volume.split(":")[0] in file["volumes"] for volume in service["volumes"]
        ),
    }
    return [what for what, holds in rules.items() if not holds]


def test_every_service_is_behind_all_walls() -> None:
    assert problems(compose()) == []


BREACHES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "north: runs as root": lambda file: file["services"]["north"].update(user="0:0"),
    "east: root file system can be written": lambda file: file["services"]["east"].pop("read_only"),
    "server: keeps capabilities": lambda file: file["services"]["server"].update(cap_add=["NET_ADMIN"]),
    "south: may gain privileges": lambda file: file["services"]["south"].update(security_opt=[]),
    "north: is privileged": lambda file: file["services"]["north"].update(privileged=True),
    "east: shares a namespace with the host": lambda file: file["services"]["east"].update(pid="host"),
    "north: has no bound on memory or processes": lambda file: file["services"]["north"].pop("mem_limit"),
    "south: has no health check": lambda file: file["services"]["south"].pop("healthcheck"),
    "north: has secrets in its environment": lambda file: file["services"]["north"].update(environment=["HF_TOKEN=x"]),
    "north: keeps its state nowhere": lambda file: file["services"]["north"]["volumes"].remove("north:/site"),
    "north: writes to a folder of the host": lambda file: file["services"]["north"]["volumes"].append("./x:/x"),
    "ports are published by ['server', 'north']": lambda file: file["services"]["north"].update(ports=["1:1"]),
    "north: reaches more than the server": lambda file: file["services"]["north"]["networks"].append("outside"),
    "north: reaches east": lambda file: file["services"]["north"]["networks"].append("east"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_wall_that_is_taken_away_is_missed(breach: str) -> None:
    # Anchors make services share lists; a change of one must not be one of all.
    file = {key: copy.deepcopy(value) for key, value in compose().items()}
    file["services"] = {name: copy.deepcopy(service) for name, service in file["services"].items()}
    BREACHES[breach](file)
    assert breach in problems(file)


def test_there_is_a_server_and_three_parties_with_a_volume_each() -> None:
    file = compose()
    assert list(file["services"]) == ["server", *PARTIES]
    assert list(file["volumes"]) == ["server", *PARTIES]
    for party in PARTIES:
        service = file["services"][party]
        assert service["command"] == ["join", "party.yaml"]
        assert service["healthcheck"]["test"][-1] == "party.yaml"
        assert f"./{party}/data:/data:ro" in service["volumes"]
    assert file["services"]["server"]["command"] == ["serve", "project.yaml"]


def test_the_project_of_the_page_fits_the_services(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if "server:" in block)
    (tmp_path / "project.yaml").write_text(block, encoding="utf-8")
    project = Project.from_yaml(tmp_path / "project.yaml")
    assert project.parties == PARTIES
    assert project.server.host == "server"
    assert compose()["services"]["server"]["ports"] == [
        f"${{FEDLLM_PORT:-{project.server.port}}}:{project.server.port}"
    ]
