"""deploy/Dockerfile and what goes into the image; that fedllm needs no more than the image gives it."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from tiny import thorough

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def instructions(keyword: str) -> list[str]:
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return [line.partition(" ")[2] for line in joined.splitlines() if line.startswith(f"{keyword} ")]


def test_the_image_runs_as_a_number_and_starts_without_a_shell() -> None:
    assert instructions("USER") == ["10001:10001"]
    assert json.loads(instructions("ENTRYPOINT")[-1]) == ["fedllm"]
    assert DOCKERFILE.index("USER 10001") > DOCKERFILE.index("COPY --from=build")
    assert not instructions("ADD")
    assert not instructions("EXPOSE")


def test_torch_comes_first_with_the_version_that_is_tested() -> None:
    first, second = (run for run in instructions("RUN") if "pip install" in run)
    assert "grep '^torch==' constraints.txt" in first
    assert "pip install -c constraints.txt '.[flare]'" in second
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch==\d", pins, re.M)
    assert re.search(r"^nvflare==2\.9\.", pins, re.M)


def test_only_what_is_named_reaches_the_build() -> None:
    """So no key, kit, state or data of a folder nearby gets into the image."""
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    copied = [word for copy in instructions("COPY") if "--from" not in copy for word in copy.split()[:-1]]
    assert sorted(copied) == sorted(allowed)
    for secret in ("coordinator/authority/ca.key", "deploy/north/party.yaml", "site-north/key.pem", ".git/config"):
        assert not any(fnmatch(secret, rule) or secret.startswith(f"{rule}/") for rule in allowed)


def test_nothing_secret_is_an_argument_or_a_variable_of_the_image() -> None:
    named = " ".join([*instructions("ARG"), *instructions("ENV")])
    assert not re.search(r"token|password|secret|index_url", named, re.I)


@pytest.mark.parametrize(
    ("said", "is_healthy"),
    [
        ({"data": {"server": {"state": "RUNNING"}, "runs": []}}, True),
        ({"data": {"server": {"state": "DOWN"}, "runs": []}}, False),
        ({"data": {"state": "CONNECTED", "server": "hub:8002", "runs": []}}, True),
        ({"data": {"state": "CONNECTING", "server": "hub:8002", "runs": []}}, False),
        ({"data": {"code": "KIT_MISSING"}}, False),
        ("no JSON at all", False),
    ],
)
def test_the_health_check_is_what_status_says(said: object, is_healthy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:] == ["-m", "fedllm", "status", "party.yaml", "--json"]
        return subprocess.CompletedProcess(command, 0, said if isinstance(said, str) else json.dumps(said))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["health.py", "party.yaml"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(DEPLOY / "health.py"), run_name="__main__")
    assert stop.value.code == (0 if is_healthy else 1)


# A numeric user without capabilities, on a root file system that nobody can write, in a /tmp where nothing can be
# executed: what compose.yaml asks for. A mount namespace stands in for the container.
_CONFINED = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
mkdir /mnt/python /mnt/packages /mnt/src /mnt/site /mnt/tmp
mount --bind {python} /mnt/python
mount --bind {packages} /mnt/packages
mount --bind {src} /mnt/src
mount --bind {site} /mnt/site
mount -t tmpfs -o size=512m,mode=1777,nosuid,nodev,noexec tmpfs /mnt/tmp
mount -o remount,ro /mnt
mount -o remount,bind,ro /
cd /mnt/site
exec setpriv --reuid=10001 --regid=10001 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \
  env -i HOME=/mnt/tmp TMPDIR=/mnt/tmp HF_HOME=/mnt/tmp/huggingface HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
  PYTHONPATH=/mnt/src:/mnt/packages PYTHONDONTWRITEBYTECODE=1 LD_LIBRARY_PATH=/mnt/python/lib \
  /mnt/python/bin/{name} {arguments}
"""


def confined(site: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    # Python and its packages may lie where only root can go.
    script = _CONFINED.format(
        python=sys.base_prefix,
        name=f"python3.{sys.version_info.minor}",
        packages=sysconfig.get_path("purelib"),
        src=ROOT / "src",
        site=site,
        arguments=arguments,
    )
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)


def can_confine() -> bool:
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("setpriv"):
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


needs_root = pytest.mark.skipif(not can_confine(), reason="makes a mount namespace: needs root, unshare and setpriv")


def hand_over(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, 10001, 10001)


@needs_root
def test_the_walls_of_the_stand_in_stand(tmp_path: Path) -> None:
    hand_over(tmp_path)
    script = """
        import os, pathlib
        assert os.getuid() == 10001 and os.getgid() == 10001
        status = pathlib.Path("/proc/self/status").read_text()
        assert "CapEff:\\t0000000000000000" in status and "NoNewPrivs:\\t1" in status
        for place in ("/", "/tmp", "/var/tmp", "/mnt"):
            try:
                pathlib.Path(place, "x").write_text("x")
            except OSError:
                continue
            raise SystemExit(f"{place} can be written")
        pathlib.Path("/mnt/site/x").write_text("x")
    """
    (tmp_path / "look.py").write_text(textwrap.dedent(script))
    done = confined(tmp_path, "look.py")
    assert done.returncode == 0, done.stdout + done.stderr


@thorough
@needs_root
@pytest.mark.timeout(200)
def test_a_run_needs_no_root_and_no_place_to_write_but_its_own(
    tmp_path: Path, base: Path, make_federation: Callable[..., Any]
) -> None:
    changes = {
        "model.model_name_or_path": "base",
        "federation.strategy.name": "FedAvgM",
        "federation.strategy.server_momentum": 0.5,
    }
    site = make_federation("site", sizes={"north": 6, "east": 9}, job=changes).folder
    shutil.copytree(base, site / "base")
    hand_over(site)
    done = confined(site, "-m fedllm up job.yaml --output up --quiet --json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["status"] == "SUCCESS"
    (adapter,) = site.glob("up/coordinator/site/state/runs/*/adapter/adapter_model.safetensors")
    assert adapter.stat().st_uid == 10001
