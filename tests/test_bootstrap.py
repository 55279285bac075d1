"""The set-up says all that is missing, before it changes anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what the set-up reads, and a folder `bin` that comes first on its path."""
    for name in ("pyproject.toml", "constraints.txt", "scripts/bootstrap.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    return tmp_path


def program(clone: Path, name: str, script: str) -> None:
    path = clone / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def set_up(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "scripts/bootstrap.sh"],
        cwd=clone,
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_missing_python_is_named(clone: Path) -> None:
    result = set_up(clone, PYTHON="no-such-python")
    assert result.returncode == 1
    assert "missing: Python 3.11 or newer" in result.stderr and "apt-get install python3" in result.stderr
    assert not (clone / ".venv").exists()


def test_an_old_python_is_refused(clone: Path) -> None:
    program(clone, "old-python", 'case "$*" in *version_info*) exit 1;; esac')
    assert set_up(clone, PYTHON="old-python").returncode == 1


def test_a_missing_venv_module_is_named_with_its_package(clone: Path) -> None:
    program(clone, "bare-python", 'case "$*" in *ensurepip*) exit 1;; *print*) echo python3.11-venv;; esac')
    result = set_up(clone, PYTHON="bare-python")
    assert result.returncode == 1
    assert "missing: the venv module" in result.stderr and "apt-get install python3.11-venv" in result.stderr
    assert not (clone / ".venv").exists()


def test_missing_disk_is_named(clone: Path) -> None:
    program(clone, "df", "echo head; echo disk 9 8 1048576 90% /")
    result = set_up(clone)
    assert result.returncode == 1
    assert "missing: disk space; about 3 GB are needed" in result.stderr and "1 GB are free" in result.stderr
    assert not (clone / ".venv").exists()


def test_all_that_is_missing_is_said_at_once(clone: Path) -> None:
    program(clone, "df", "echo head; echo disk 9 8 1048576 90% /")
    result = set_up(clone, PYTHON="no-such-python")
    assert result.stderr.count("missing:") == 2


def test_nothing_is_installed_twice(clone: Path) -> None:
    venv = clone / ".venv"
    (venv / "bin").mkdir(parents=True)
    program(clone, "python", "exit 0")
    for name in ("python", "pip", "fedllm"):
        shutil.copy(clone / "bin" / "python", venv / "bin" / name)
    (venv / "bin" / "python").write_text('#!/bin/sh\necho "$@" >> calls\n')
    first = set_up(clone)
    assert first.returncode == 0, first.stderr
    installs = [line for line in (clone / "calls").read_text().splitlines() if "pip install" in line]
    assert len(installs) == 2 and installs[0].split()[-1].startswith("torch==") and installs[1].endswith("-e .")
    assert set_up(clone).returncode == 0
    assert sum("pip install" in line for line in (clone / "calls").read_text().splitlines()) == 2
    (clone / "constraints.txt").write_text("torch==9.9\n")
    set_up(clone)
    assert "torch==9.9" in (clone / "calls").read_text()


def test_torch_is_pinned_to_one_version() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert [pin for pin in pins if pin.startswith("torch==")] == ["torch==2.13.0"]
    assert all("==" in pin and "://" not in pin for pin in pins if not pin.startswith("#"))
