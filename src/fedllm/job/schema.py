"""The JSON Schemas of job.yaml, party.yaml and project.yaml, for editors and for the reference."""

from __future__ import annotations

from typing import Any

from fedllm.job.party import Party
from fedllm.job.project import Project


def json_schema(kind: str) -> dict[str, Any]:
    """Return the JSON Schema of a file.

    Args:
        kind: `job`, `party` or `project`.
    """
    if kind == "job":
        return _job_schema()
    return (Party if kind == "party" else Project).model_json_schema()


def _job_schema() -> dict[str, Any]:
    from fedllm.job.job import Job
    from fedllm.scenarios import SCENARIOS

    schema = Job.model_json_schema()
    # What `federation` holds depends on `scenario`; the model's own schema knows only what all scenarios share.
    settings = []
    for name, line in SCENARIOS.items():
        own = line.settings.model_json_schema(ref_template="#/$defs/{model}")
        schema["$defs"] |= own.pop("$defs", {}) | {f"{name}Settings": own}
        settings.append({"$ref": f"#/$defs/{name}Settings"})
    schema["properties"]["federation"] = {"anyOf": settings, "description": "The scenario's settings."}
    schema["properties"]["scenario"]["enum"] = list(SCENARIOS)
    schema["$defs"].pop("ScenarioSettings", None)
    return schema
