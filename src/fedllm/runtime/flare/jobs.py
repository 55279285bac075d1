"""A run as a job of FLARE: configuration only, and no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedllm.runs.jsonl import write_json


def write_job(folder: Path, *, job: dict[str, Any], name: str, parties: list[str], run_id: str) -> Path:
    """Write the job folder that is submitted to FLARE and return it.

    Args:
        folder: Where it goes.
        job: The job as plain values; each site checks it against what it approved.
        name: The job's name.
        parties: The parties that take part.
        run_id: The run.
    """
    where = folder / name
    prefix = "fedllm.runtime.flare"
    server = {
        "format_version": 2,
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [],
        "workflows": [{"id": "run", "path": f"{prefix}.controller.RunController", "args": {"run_id": run_id}}],
    }
    # As text: in a tree, FLARE takes `{name: FedAvg}` for its own class of that name, and refuses it.
    settings = json.dumps(job, ensure_ascii=False)
    executor = {"path": f"{prefix}.executor.PartyExecutor", "args": {"job": settings, "run_id": run_id}}
    client = {
        "format_version": 2,
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [],
        "executors": [{"tasks": ["none"], "executor": executor}],
    }
    for app, file, config in (
        ("server", "config_fed_server.json", server),
        ("party", "config_fed_client.json", client),
    ):
        (where / app / "config").mkdir(parents=True, exist_ok=True)
        write_json(where / app / "config" / file, config)
    meta = {
        "name": name,
        "resource_spec": {},
        "min_clients": len(parties),
        "mandatory_clients": parties,
        "deploy_map": {"server": ["server"], "party": parties},
    }
    write_json(where / "meta.json", meta)
    return where
