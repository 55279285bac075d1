"""project.yaml: what cannot work is refused where it is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import ConfigError
from fedllm.job.project import Project

GOOD: dict[str, Any] = {"name": "trial", "server": {"host": "fl.example.org", "port": 8002}, "parties": ["north"]}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"parties": ["server"]}, "server"),
        ({"parties": ["admin"]}, "admin"),
        ({"parties": ["North"]}, "North"),
        ({"parties": ["north", "north"]}, "same name"),
        ({"parties": []}, "parties"),
        ({"name": "../x"}, "name"),
        ({"certificate_days": 0}, "certificate_days"),
        ({"server": {"host": "0.0.0.0", "port": 1}}, "nobody"),  # noqa: S104
        ({"server": {"host": "999.1.1.1", "port": 1}}, "no IP"),
        ({"server": {"host": "https://x.org", "port": 1}}, "no IP"),
        ({"server": {"host": "x.org:8002", "port": 1}}, "no IP"),
        ({"server": {"host": "-x.org", "port": 1}}, "no IP"),
        ({"server": {"host": "x.org", "port": 0}}, "port"),
    ],
)
def test_a_project_that_cannot_work_is_refused(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=re.escape(word)):
        Project.model_validate(GOOD | changes)


def test_a_project_file_is_read_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "project.yaml"
    path.write_text("name: trial\nserver: {host: FL.example.org}\nparties: [north]\n")
    project = Project.from_yaml(path)
    assert (project.server.host, project.server.port, project.certificate_days) == ("fl.example.org", 8002, 365)
    path.write_text("name: trial\nserver: {host: fl.example.org}\nparties: [north]\ncertificate_day: 3\n")
    with pytest.raises(ConfigError) as caught:
        Project.from_yaml(path)
    assert caught.value.where == f"{path}:4" and "certificate_days" in caught.value.fix


def test_a_typo_is_explained_without_loading_torch(tmp_path: Path) -> None:
    file = tmp_path / "project.yaml"
    file.write_text("name: trial\nserver: {hots: x}\nparties: [north]\n")
    code = "import sys\nfrom fedllm.errors import ConfigError\nfrom fedllm.job.project import Project\n"
    code += "try:\n    Project.from_yaml(sys.argv[1])\nexcept ConfigError as error:\n    print(error.fix)\n"
    code += "print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(file)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "did you mean `host`?" in found and found.endswith("False\n")
