"""party.yaml: what stays at a site. A site can only tighten what a job asks."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from fedllm.data.settings import DataSource
from fedllm.models.emulator_settings import EmulatorSettings
from fedllm.ownership.settings import PartyOwnership

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,31}$"


class Limits(BaseModel):
    """What this site allows; None is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    allowed_scenarios: list[str] | None = Field(None, description="Scenarios that may run here.")
    allowed_methods: list[str] | None = Field(None, description="Tuning methods (`peft_type`) that may run here.")
    allowed_operations: list[str] | None = Field(
        None, description="Requests that this site answers, such as Train; null: all of an allowed scenario."
    )
    max_rounds: int | None = Field(None, ge=1, description="Most rounds of a job.")
    min_parties: int = Field(
        2, ge=1, description="A job must have at least so many parties, and in each round (its own `min_parties`)."
    )
    max_upload_bytes_per_round: int | None = Field(None, ge=1, description="Most bytes that leave per round.")
    max_upload_bytes: int | None = Field(None, ge=1, description="Most bytes that leave in a whole run.")
    max_package_bytes: int = Field(
        2**35,
        ge=0,
        description="Offsite tuning: the longest package that this site takes over the wire; 0: none. Default: 32 GiB.",
    )
    require_approval: bool = Field(
        True, description="Between machines: run only jobs that a person approved here with `fedllm approve`."
    )
    require_secure_aggregation: bool = Field(False, description="Run only jobs with secure aggregation.")
    max_epsilon: float | None = Field(
        None,
        gt=0,
        description="Run only jobs whose noise is the site's own, of this epsilon at most; all runs on the same "
        "training data together stay within it, by the site's ledger.",
    )
    max_delta: float = Field(
        1e-5, gt=0, le=0.01, description="With `max_epsilon`: the largest delta that a job may name; below 1/examples."
    )


class Party(BaseModel):
    """One site's own file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    schema_version: int = Field(1, ge=1, le=1, description="Version of this file's layout.")
    name: str = Field(pattern=NAME_PATTERN, description="The party's name in the job: a-z, 0-9, - and _.")
    data: DataSource = Field(description="Where this party's examples are. They are never sent.")
    model_name_or_path: str | None = Field(
        None, description="This site's own copy of the job's base model; its digest must agree."
    )
    emulator: EmulatorSettings | None = Field(
        None, description="Offsite tuning, the model's owner only: the whole model, and how its emulator is made."
    )
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N.")
    ownership: PartyOwnership = Field(PartyOwnership(), description="Where this site's key and claims of a model are.")
    limits: Limits = Field(Limits(), description="What this site allows.")
