"""No code travels: what an evil coordinator, with the right keys, hands to a site is refused there and never runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("nvflare")

from fedllm.identity.files import CoordinatorFolder
from fedllm.identity.kit import open_kit
from fedllm.job.project import Project
from fedllm.runs.jsonl import write_json
from fedllm.runtime.flare.door import SOCKETS
from fedllm.runtime.flare.workspace import write_workspace
from fedllm.runtime.provision import provision_all

HERE = Path(__file__).parent
GUARDED, UNGUARDED = "guarded", "unguarded"
CANARY = """
import pathlib
pathlib.Path({path!r}).write_text("ran")
from nvflare.apis.executor import Executor
class Evil(Executor):
    pass
"""


def write_job(folder: Path, name: str, party: str, executor: dict[str, Any], *, code: str = "") -> None:
    where = folder / f"{name}-{party}"
    none: dict[str, Any] = {"format_version": 2, "task_data_filters": [], "task_result_filters": [], "components": []}
    workflow = {"id": "run", "path": "fedllm.runtime.flare.controller.RunController", "args": {"run_id": "0" * 32}}
    for app, file, config in (
        ("server", "config_fed_server.json", none | {"workflows": [workflow]}),
        ("party", "config_fed_client.json", none | {"executors": [{"tasks": ["none"], "executor": executor}]}),
    ):
        (where / app / "config").mkdir(parents=True)
        write_json(where / app / "config" / file, config)
    if code:
        (where / "party" / "custom").mkdir()
        (where / "party" / "custom" / "evil.py").write_text(code)
    deploy = {"server": ["server"], "party": [party]}
    meta = {"name": name, "resource_spec": {}, "min_clients": 1, "mandatory_clients": [party], "deploy_map": deploy}
    write_json(where / "meta.json", meta)


def canary(folder: Path, name: str, party: str) -> Path:
    return folder / f"{name}-{party}.ran"


def write_jobs(folder: Path) -> None:
    for party in (GUARDED, UNGUARDED):
        ran = canary(folder, "code", party)
        write_job(folder, "code", party, {"path": "evil.Evil", "args": {}}, code=CANARY.format(path=str(ran)))
        # A class that every site has, but that is not on its list: it starts any program.
        touch = {"args": ["touch", str(canary(folder, "class", party))]}
        write_job(folder, "class", party, {"path": "subprocess.Popen", "args": touch})
    write_job(folder, "unsigned", GUARDED, {"path": "fedllm.runtime.flare.executor.PartyExecutor", "args": {}})


def let_all_in(root: Path) -> None:
    """Take the guards off a site's workspace, as FLARE's own defaults are for a project's administrator."""
    resources = json.loads((root / "local" / "resources.json").read_text())
    resources["class_list_enforcement_mode"] = "warn"
    write_json(root / "local" / "resources.json", resources)
    rights = json.loads((root / "local" / "authorization.json").read_text())
    rights["permissions"]["project_admin"] = "any"
    write_json(root / "local" / "authorization.json", rights)


@contextmanager
def processes(commands: dict[str, list[str]], logs: Path) -> Iterator[None]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    started = []
    sockets = tempfile.TemporaryDirectory(prefix="fedllm-")
    environment[SOCKETS] = sockets.name
    try:
        for name, command in commands.items():
            with (logs / f"{name}.log").open("wb") as log:
                started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()
        # The processes of jobs lead groups of their own.
        for left in psutil.process_iter():
            try:
                if str(logs) in " ".join(left.cmdline()):
                    left.kill()
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        sockets.cleanup()


@pytest.mark.timeout(300)
def test_code_and_foreign_classes_are_refused_at_the_site_and_never_run(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"host": "127.0.0.1", "port": probe.getsockname()[1]}
    sites = {name: tmp_path / f"site-{name}" for name in (GUARDED, UNGUARDED)}
    project = Project.model_validate({"name": "evil", "server": address, "parties": list(sites)})
    provision_all(tmp_path / "coordinator", project, sites)
    folder = CoordinatorFolder(tmp_path / "coordinator")
    root = folder.site / "state" / "flare"
    commands = {"server": write_workspace(open_kit(folder.site), root, admin=folder.admin)}
    text = (root / "local" / "resources.json").read_text()
    (root / "local" / "resources.json").write_text(
        text.replace("fedllm.runtime.flare.clerk.Clerk", "evil_clerk.EvilClerk")
    )
    for name, site in sites.items():
        commands[name] = write_workspace(open_kit(site), site / "state" / "flare")
    let_all_in(sites[UNGUARDED] / "state" / "flare")
    let_all_in(root)
    server = json.loads((root / "startup" / "fed_server.json").read_text())
    write_json(root / "startup" / "fed_server.json", server | {"require_signed_jobs": False})
    jobs = folder.site / "evil"
    write_jobs(jobs)
    expected = [path.name for path in jobs.iterdir()]
    with processes(commands, tmp_path):
        until = time.monotonic() + 240
        while not all((jobs / f"{name}.txt").exists() for name in expected) and time.monotonic() < until:
            time.sleep(0.2)
        found = {path.stem: path.read_text() for path in jobs.glob("*.txt")}
    assert sorted(found) == sorted(expected), [*found.items(), *(p.read_text()[-800:] for p in tmp_path.glob("*.log"))]
    for name in ("code", "class"):
        # With the guards off the attack works, so it is the guards that stop it.
        assert canary(jobs, name, UNGUARDED).exists(), (name, found)
        assert not canary(jobs, name, GUARDED).exists(), (name, found)
    assert "BYOC not permitted" in found[f"code-{GUARDED}"]
    assert "signed" in found[f"unsigned-{GUARDED}"]
