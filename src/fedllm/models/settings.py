"""The job's `model` and `peft` sections."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class ModelSettings(BaseModel):
    """Which base model every party holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    model_name_or_path: str = Field(
        description="Folder (relative to job.yaml) or hub id of the base model and its tokenizer."
    )
    model_revision: str = Field("main", description="Branch, tag or commit, for a hub id.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Dtype of the frozen base model.")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="Attention code of transformers."
    )
    base_digest: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 that every party's base model must have (`fedllm validate` prints it).",
    )


class PeftSettings(BaseModel):
    """The tuning method and its sizes, under PEFT's names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"] = Field("LORA", description="Tuning method.")
    r: int = Field(8, ge=1, le=1024, description="Rank of the LoRA factors.")
    lora_alpha: float = Field(16, gt=0, description="LoRA scale: alpha / r, or alpha / sqrt(r) with rsLoRA.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the first LoRA factor.")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="`all-linear`, a regular expression, or module names such as [q_proj, v_proj].",
    )
    modules_to_save: list[str] | None = Field(
        None, description="Modules trained in full beside the adapter, and federated with it."
    )
    use_rslora: bool = Field(False, description="Rank-stabilised scale alpha / sqrt(r).")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA.")

    @field_validator("target_modules")
    @classmethod
    def _targets_not_empty(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("nothing would be trained; try `all-linear`")
        return value
