"""job.yaml: what all parties agree on. Frozen; its digest names the run's plan."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
)

from fedllm.data.settings import DataSettings
from fedllm.errors import ConfigError
from fedllm.job.loading import Origins, load_model
from fedllm.job.party import NAME_PATTERN, Party
from fedllm.models.digest import json_digest
from fedllm.models.settings import ModelSettings, PeftSettings
from fedllm.ownership.settings import OwnershipSettings
from fedllm.privacy.settings import PrivacySettings
from fedllm.scenarios import SCENARIOS
from fedllm.scenarios.base import Scenario, ScenarioSettings
from fedllm.tasks import Task
from fedllm.train.settings import TrainSettings


class EvaluateSettings(BaseModel):
    """How models are judged. The held-out split of each party is named in its own party.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    test: str | None = Field(
        None, description="Common test set that no party trains on: a data file, relative to job.yaml."
    )
    per_device_eval_batch_size: int = Field(32, ge=1, description="Examples per forward pass.")
    max_new_tokens: int = Field(128, ge=1, description="Longest generated answer, in tokens.")
    max_examples: int | None = Field(None, ge=1, description="Use only the first so many test examples.")


class RuntimeSettings(BaseModel):
    """With how many threads the parties compute. A part of the plan, because another number gives other bits."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    num_threads: int = Field(1, ge=1, le=256, description="Compute threads of each process.")


class Job(BaseModel):
    """A job, checked. `Job.from_yaml` reads one from a file; a run starts with `fedllm.run_local(job)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schema_version: Literal[1] = Field(1, description="Version of this file's layout.")
    name: str = Field(pattern=NAME_PATTERN, description="Name of the job; run folders are named after it.")
    seed: int = Field(0, ge=0, lt=2**63, description="All randomness of the run follows from it.")
    parties: list[str] = Field(min_length=1, max_length=1000, description="Names of the parties.")
    scenario: str = Field("FedHomoLLM", description="Which algorithm: " + ", ".join(SCENARIOS) + ".")
    federation: SerializeAsAny[ScenarioSettings] = Field(description="The scenario's settings.")
    model: ModelSettings = Field(description="The base model.")
    peft: PeftSettings = Field(PeftSettings(), description="The tuning method.")
    data: DataSettings = Field(DataSettings(), description="How examples become tokens.")
    train: TrainSettings = Field(description="Local training.")
    privacy: PrivacySettings = Field(PrivacySettings(), description="What is protected in training.")
    ownership: OwnershipSettings = Field(OwnershipSettings(), description="Who claims the tuned model, and how.")
    evaluate: EvaluateSettings = Field(EvaluateSettings(), description="Evaluation.")
    runtime: RuntimeSettings = Field(RuntimeSettings(), description="Threads.")

    _base_dir: Path = PrivateAttr(default_factory=Path.cwd)
    _origins: Origins = PrivateAttr(default_factory=dict)

    @classmethod
    def from_yaml(cls, path: str | Path, *, overrides: list[str] | None = None) -> Job:
        """Return the job in a file.

        Args:
            path: The job file; relative paths in it start at its folder.
            overrides: `key.path=value` settings that win over the file.

        Raises:
            ConfigError: With file, line, key and the mend; `also` holds further errors of the same file.
        """
        file = Path(path)
        job, origins = load_model(cls, file, overrides=overrides or [])
        return job.located(file.resolve().parent, origins)

    def located(self, base_dir: Path, origins: Origins | None = None) -> Job:
        """Return the job with relative paths starting at a folder.

        Args:
            base_dir: The folder.
            origins: Where each value came from.
        """
        job = self.model_copy()
        job._base_dir = base_dir
        job._origins = self._origins if origins is None else origins
        return job

    @field_validator("scenario")
    @classmethod
    def _scenario_known(cls, value: str) -> str:
        if value not in SCENARIOS:
            raise ValueError(f"unknown scenario; one of: {', '.join(SCENARIOS)}")
        return value

    @field_validator("federation", mode="before")
    @classmethod
    def _federation_of_scenario(cls, value: Any, info: ValidationInfo) -> Any:
        scenario = SCENARIOS.get(info.data.get("scenario", ""))
        return scenario.settings.model_validate(value) if scenario else value

    @field_validator("parties")
    @classmethod
    def _names_differ(cls, names: list[str]) -> list[str]:
        for name in names:
            if not re.fullmatch(NAME_PATTERN, name):
                raise ValueError(f"party name {name!r} is not allowed; use a-z, 0-9, - and _, at most 32 characters")
        if len(set(names)) < len(names):
            raise ValueError("two parties have the same name; give each a name of its own")
        return names

    @property
    def base_dir(self) -> Path:
        """The folder where relative paths start."""
        return self._base_dir

    @property
    def origins(self) -> Origins:
        """Where each value came from: `file:line`, `flag`, or absent for a default."""
        return self._origins

    @property
    def digest(self) -> str:
        """SHA-256 over all settings; two jobs with one digest have one plan.

        What is not set is left out, so that runs of before stay what they were when a key is added that may be unset.
        """
        return json_digest(self.model_dump(mode="json", exclude_none=True))

    @property
    def task(self) -> Task:
        """What the model is tuned to do."""
        return Task(self.data.task, self.data.label_names)

    def table_line(self) -> Scenario:
        """Return the scenario's line in the table of scenarios."""
        return SCENARIOS[self.scenario]

    @property
    def trainers(self) -> tuple[str, ...]:
        """The parties that train, in the job's order: all, but for the owner of a model that others tune."""
        return self.table_line().trainers(self.federation, self.parties)

    @property
    def sender(self) -> str | None:
        """The party that sends the base model to those who lack it; None where each brings its own."""
        return self.table_line().sender(self.federation, self.parties)

    def path(self, name: str) -> Path:
        """Return a path of the job, made absolute.

        Args:
            name: As written in the job.
        """
        return (self._base_dir / Path(name).expanduser()).resolve()


class LocatedParty(BaseModel):
    """A party with the folder where its relative paths start."""

    model_config = ConfigDict(frozen=True)

    party: Party
    base_dir: Path


def load_parties(job: Job, folder: Path | None = None) -> list[LocatedParty]:
    """Return the party files of a job, in the job's order: `parties/NAME.yaml` beside the job file.

    Args:
        job: The job.
        folder: Another folder with one `NAME.yaml` per party.

    Raises:
        ConfigError: A file is missing, wrong, or names another party.
    """
    folder = folder or job.base_dir / "parties"
    located = []
    for name in job.parties:
        path = folder / f"{name}.yaml"
        if not path.is_file():
            raise ConfigError(
                "PARTY_UNKNOWN",
                f"the job names the party `{name}`, but there is no {path}",
                where="parties",
                fix=f"write {path.name}, or take `{name}` out of the job",
            )
        found = load_party(path)
        if found.party.name != name:
            what = f"the file names itself `{found.party.name}`"
            raise ConfigError("PARTY_UNKNOWN", what, where=str(path), fix=f"set `name: {name}`")
        located.append(found)
    return located


def load_party(path: Path) -> LocatedParty:
    """Return the party in a file, with the folder where its relative paths start.

    Args:
        path: The file.

    Raises:
        ConfigError: The file is missing or wrong.
    """
    party, _ = load_model(Party, path, overrides=[])
    return LocatedParty(party=party, base_dir=path.resolve().parent)
