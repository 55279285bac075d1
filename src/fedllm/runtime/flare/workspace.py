"""What NVIDIA FLARE's processes read when they start: made anew at each start from the site's verified kit.

FLARE is used below its machine-learning layer: mutual TLS, the processes of a job at each site, who may submit one.
No code travels: a job is configuration, and only classes under this folder may be named in it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from fedllm.identity.authority import is_loopback
from fedllm.identity.kit import Kit
from fedllm.runs.jsonl import write_json
from fedllm.runtime.flare.transport import LOCAL_SCHEME, TLS_SCHEME

# FLARE loads a class by its path from a job's config only if the path begins with one of these.
CLASS_ALLOW_LIST = ["fedllm.runtime.flare."]
# Dozens of threads carry messages; with an arena of memory each, a process would keep many times what it needs. And
# memory for pieces and tensors, freed and taken again all the time, is not given back to the system each time.
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**20 + 2**16),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}
_ORG = "fedllm"
_COMMON = {"format_version": 2, "class_list_enforcement_mode": "enforce", "class_allow_list": CLASS_ALLOW_LIST}


def write_workspace(kit: Kit, root: Path, *, admin: Path | None = None) -> list[str]:
    """Write FLARE's start-up files and return the command that starts its process.

    Args:
        kit: Who this site is, and where the server listens.
        root: The workspace; what an earlier start left in `startup` and `local` is replaced.
        admin: At the server, the folder of the identity that signs jobs.
    """
    for name in ("startup", "local"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir(parents=True)
    (root / "transfer").mkdir(exist_ok=True)
    # A job's signature is checked against the authority under this name.
    (root / "startup" / "rootCA.pem").write_bytes(kit.ca.read_bytes())
    write_json(root / "local" / "log_config.json", _logs(root.parent / "log.txt"))
    write_json(root / "local" / "authorization.json", _permissions(at_server=admin is not None))
    write_json(root / "local" / "comm_config.json", _communication())
    return _client(kit, root) if admin is None else _server(kit, root, admin)


def _server(kit: Kit, root: Path, admin: Path) -> list[str]:
    # By a public name the server may be behind another address than its machine's own.
    server = _project(kit, kit.host if is_loopback(kit.host) else "0.0.0.0") | {  # noqa: S104
        "admin_server": kit.host,
        "admin_port": kit.port,
        "ssl_private_key": str(kit.key),
        "ssl_cert": str(kit.cert),
        "ssl_root_cert": str(kit.ca),
        "connection_security": "mtls",
    }
    write_json(root / "startup" / "fed_server.json", {"format_version": 2, "servers": [server]})
    write_json(root / "local" / "resources.json", _server_resources(kit, root, admin))
    module = "nvflare.private.fed.app.server.server_train"
    return [sys.executable, "-u", "-m", module, "-m", str(root), "-s", "fed_server.json", *_options("")]


def _client(kit: Kit, root: Path) -> list[str]:
    client = {
        "ssl_private_key": str(kit.key),
        "ssl_cert": str(kit.cert),
        "ssl_root_cert": str(kit.ca),
        "fqsn": kit.name,
        "is_leaf": True,
        "connection_security": "mtls",
        # So long a party waits for the answer to a heartbeat, during which it sends no other: one that a dying server
        # left open would keep the party off the new server's list for FLARE's default of 30 s.
        "maint_msg_timeout": 6.0,
    }
    servers = [_project(kit, kit.host) | {"identity": "server"}]
    write_json(root / "startup" / "fed_client.json", {"format_version": 2, "servers": servers, "client": client})
    write_json(root / "local" / "resources.json", _client_resources(kit))
    module = "nvflare.private.fed.app.client.client_train"
    return [sys.executable, "-u", "-m", module, "-m", str(root), "-s", "fed_client.json", *_options(kit.name)]


def _options(uid: str) -> list[str]:
    named = [f"uid={uid}"] if uid else []
    return ["--set", "secure_train=true", *named, f"org={_ORG}", "config_folder=config", "heart_beat_interval=2.0"]


def _project(kit: Kit, host: str) -> dict[str, Any]:
    return {"name": kit.project, "service": {"target": f"{host}:{kit.port}", "scheme": TLS_SCHEME}}


def _communication() -> dict[str, Any]:
    return {
        "max_message_size": 64 * 2**20,
        "allow_adhoc_conns": False,
        "comm_driver_path": str(Path(__file__).parent / "drivers"),
        "internal": {"scheme": LOCAL_SCHEME, "resources": {"connection_security": "clear"}},
    }


def _component(name: str, path: str, **args: Any) -> dict[str, Any]:
    return {"id": name, "path": f"nvflare.{path}", "args": args}


def _server_resources(kit: Kit, root: Path, admin: Path) -> dict[str, Any]:
    store = {"path": "nvflare.app_common.storages.filesystem_storage.FilesystemStorage"}
    # FLARE's default is one folder under the system's temporary folder for all servers of a machine.
    snapshots = store | {"args": {"root_dir": str(root / "snapshots"), "uri_root": "/"}}
    persistor = "nvflare.app_common.state_persistors.storage_state_persistor.StorageStatePersistor"
    return _COMMON | {
        "servers": [{"admin_storage": "transfer", "max_num_clients": 1000, "heart_beat_timeout": 15}],
        "snapshot_persistor": {"path": persistor, "args": {"uri_root": "/", "storage": snapshots}},
        "components": [
            _component(
                "job_scheduler",
                "app_common.job_schedulers.job_scheduler.DefaultJobScheduler",
                max_jobs=4,
                min_schedule_interval=1.0,
                max_schedule_interval=5.0,
            ),
            _component(
                "job_manager",
                "apis.impl.job_def_manager.SimpleJobDefManager",
                uri_root=str(root / "jobs"),
                job_store_id="job_store",
            ),
            _component("job_store", "app_common.storages.filesystem_storage.FilesystemStorage"),
            _component("launcher", "app_common.job_launcher.server_process_launcher.ServerProcessJobLauncher"),
            {
                "id": "clerk",
                "path": "fedllm.runtime.flare.clerk.Clerk",
                "args": {"site": str(kit.site), "admin": str(admin)},
            },
        ],
    }


def _client_resources(kit: Kit) -> dict[str, Any]:
    no_gpus = {"num_of_gpus": 0, "mem_per_gpu_in_GiB": 0}
    return _COMMON | {
        "allow_log_streaming": False,
        "client": {"retry_timeout": 30, "compression": "None"},
        "components": [
            _component(
                "resource_manager", "app_common.resource_managers.gpu_resource_manager.GPUResourceManager", **no_gpus
            ),
            _component("resource_consumer", "app_common.resource_consumers.gpu_resource_consumer.GPUResourceConsumer"),
            _component("launcher", "app_common.job_launcher.client_process_launcher.ClientProcessJobLauncher"),
            {"id": "doorman", "path": "fedllm.runtime.flare.doorman.Doorman", "args": {"site": str(kit.site)}},
        ],
    }


def _permissions(*, at_server: bool) -> dict[str, Any]:
    # Jobs begin at the server's own clerk: nobody can log in to submit one, to look, to stop, to bring code. A party
    # takes jobs that the coordinator's key signed, and what it approved of them.
    rights = ("submit_job", "manage_job", "clone_job", "download_job", "view", "operate", "shell_commands", "byoc")
    nothing = dict.fromkeys((*rights, "server-predeployed-flwr"), "none")
    coordinator = nothing if at_server else nothing | {"submit_job": "any"}
    others = dict.fromkeys(("org_admin", "lead", "member"), nothing)
    return {"format_version": "1.0", "permissions": {"project_admin": coordinator, **others}}


def _logs(file: Path) -> dict[str, Any]:
    # One file for the parent and the processes of its jobs, whose own folders FLARE packs away when they end.
    handler = {"class": "logging.FileHandler", "level": "INFO", "formatter": "plain", "filename": str(file)}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"}},
        "handlers": {"file": handler},
        "loggers": {
            # While a server is away FLARE complains twice a second; our own transport says it once.
            "root": {"level": "ERROR", "handlers": ["file"]},
            "nvflare.fuel.f3": {"level": "CRITICAL"},
            "fedllm": {"level": "INFO", "handlers": ["file"], "propagate": False},
        },
    }
