"""deploy/systemd: the units are ones that systemd takes, and confine what they start."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedllm.errors import ExitCode

UNITS = sorted((Path(__file__).parents[2] / "deploy" / "systemd").glob("*.service"))
_WALLS = {
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "SystemCallFilter": "@system-service",
    "Restart": "on-failure",
    "KillMode": "mixed",
    "UMask": "0077",
}
# What a person has to mend: starting again at once would only hide it.
_FINAL = {ExitCode.USAGE, ExitCode.REFUSED, ExitCode.IDENTITY, ExitCode.STATE_LOST}
needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")


def settings(unit: Path) -> dict[str, str]:
    lines = unit.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"[A-Z]\w+=", line))


def test_there_is_a_unit_for_the_server_and_one_for_any_party() -> None:
    assert [unit.name for unit in UNITS] == ["fedllm-join@.service", "fedllm-serve.service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_confines_what_it_starts(unit: Path) -> None:
    found = settings(unit)
    assert {name: found[name] for name in _WALLS} == _WALLS
    assert found["User"] == found["Group"] == "fedllm"
    assert {int(code) for code in found["RestartPreventExitStatus"].split()} == {int(code) for code in _FINAL}
    assert {int(code) for code in found["SuccessExitStatus"].split()} == {130, 143}
    assert "#MemoryMax=" in unit.read_text(encoding="utf-8")


def test_a_site_writes_to_its_own_folder_alone() -> None:
    join, serve = (settings(unit) for unit in UNITS)
    assert join["ReadWritePaths"] == "/var/lib/fedllm/%i/site-%i"
    assert join["ExecStart"].endswith("fedllm join /var/lib/fedllm/%i/party.yaml")
    assert serve["ExecStart"].endswith(f"fedllm serve {serve['ReadWritePaths']}/project.yaml")


def as_installed(unit: Path, folder: Path) -> Path:
    """Copy a unit for a machine that has fedllm where the unit expects it."""
    program = folder / "fedllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = unit.read_text(encoding="utf-8").replace("/opt/fedllm/bin/fedllm", str(program))
    copy = folder / unit.name
    copy.write_text(text, encoding="utf-8")
    return copy


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_the_unit_without_a_word(unit: Path, tmp_path: Path) -> None:
    command = ["systemd-analyze", "verify", "--man=no", as_installed(unit, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_finds_little_exposed(unit: Path, tmp_path: Path) -> None:
    """Of 10, where a service without any wall has 9.6."""
    copy = as_installed(unit, tmp_path)
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", copy]
    assert subprocess.run(command, capture_output=True).returncode == 0
    copy.write_text(copy.read_text(encoding="utf-8").replace("SystemCallFilter=@system-service\n", ""))
    assert subprocess.run(command, capture_output=True).returncode != 0
