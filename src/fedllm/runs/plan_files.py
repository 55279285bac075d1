"""What a run was asked: job.yaml (effective), config.json (origin of each value), provenance.json."""

from __future__ import annotations

import io
import json
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from fedllm.disk import write_atomic
from fedllm.errors import ConfigError, ModelError
from fedllm.job.job import Job, LocatedParty
from fedllm.job.party import Party
from fedllm.runs.folder import RunFolder, now, run_identity
from fedllm.runs.jsonl import write_json

LIBRARIES = ("fedllm", "torch", "transformers", "peft", "safetensors", "numpy", "dp-accounting")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the bits of a run."""
    return dict(_versions())


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((name, version(name)) for name in LIBRARIES)


def effective(job: Job) -> list[dict[str, Any]]:
    """Return every setting of a job with its value and where it came from.

    Args:
        job: The job.
    """
    rows: list[dict[str, Any]] = []
    _flatten(job.model_dump(mode="json"), "", job, rows)
    return rows


def _flatten(value: Any, key: str, job: Job, rows: list[dict[str, Any]]) -> None:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            _flatten(item, f"{key}.{name}" if key else name, job, rows)
        return
    rows.append({"key": key, "value": value, "origin": job.origins.get(key, "default")})


def write_plan(run: RunFolder, job: Job, parties: list[LocatedParty]) -> None:
    """Write what a run is asked, so that it can be resumed and read later.

    Args:
        run: The run folder.
        job: The job.
        parties: The parties of this machine.
    """
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(job.model_dump(mode="json"), text)
    head = "# The settings that took effect, defaults included. config.json says where each came from.\n"
    write_atomic(run.path / "job.yaml", (head + text.getvalue()).encode())
    write_json(run.path / "config.json", {"job_digest": job.digest, "values": effective(job)})
    local = [{"party": item.party.model_dump(mode="json"), "base_dir": str(item.base_dir)} for item in parties]
    write_json(run.path / "local.json", {"base_dir": str(job.base_dir), "parties": local})
    run.event("run_started", detail=f"job {job.name}, digest {job.digest}")


def _check_unchanged(before: dict[str, Any], digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        if before.get(name) != digest:
            raise ModelError(
                "MODEL_MISMATCH",
                f"the {name.replace('_', ' ')} is not the one that the run began with",
                where="evaluate.test" if name == "common_digest" else "model.model_name_or_path",
                fix="put the old file or folder back, or start a new run",
            )


def read_plan(path: Path) -> tuple[Job, list[LocatedParty]]:
    """Return the job and the parties that a run was started with.

    Args:
        path: The run folder.

    Raises:
        ConfigError: `RUN_NOT_FOUND`, or `RUN_EXISTS` when its job.yaml was changed since.
    """
    digest = run_identity(path)["job_digest"]
    try:
        local = json.loads((path / "local.json").read_text(encoding="utf-8"))
        job = Job.from_yaml(path / "job.yaml").located(Path(local["base_dir"]))
        parties = [
            LocatedParty(party=Party.model_validate(item["party"]), base_dir=Path(item["base_dir"]))
            for item in local["parties"]
        ]
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ConfigError) and error.code != "FILE_NOT_FOUND":
            raise
        raise ConfigError(
            "RUN_NOT_FOUND", "no run is in this folder", where=str(path), fix="name a folder that `fedllm run` made"
        ) from None
    if job.digest != digest:
        raise ConfigError(
            "RUN_EXISTS",
            "the run was started with other settings than its job.yaml has now",
            where=str(path / "job.yaml"),
            fix="undo the change, or start a new run from a job file of your own",
        )
    return job, parties


def write_provenance(run: RunFolder, job: Job, **digests: str) -> None:
    """Write what the run's bits depend on; on resume, check that the models and the test set are still the same.

    Args:
        run: The run folder.
        job: The job.
        digests: SHA-256 of base model, tokenizer, template, common test set.

    Raises:
        ModelError: `MODEL_MISMATCH`.
    """
    try:
        before = json.loads((run.path / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before is not None:
        _check_unchanged(before, digests)
        return
    machine = {"platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()}
    write_json(
        run.path / "provenance.json",
        {
            "job_digest": job.digest,
            "run_id": run.run_id,
            **digests,
            "seed": job.seed,
            "num_threads": job.runtime.num_threads,
            "versions": versions(),
            "machine": machine,
            "started": now(),
            "scenario": job.scenario,
            "model_name_or_path": job.model.model_name_or_path,
        },
    )
