"""The job's `model` and `peft` sections."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedllm.variants import with_own


class ModelSettings(BaseModel):
    """Which base model every party holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    model_name_or_path: str = Field(
        description="Folder (relative to job.yaml) or hub id of the base model and its tokenizer."
    )
    model_revision: str = Field("main", description="Branch, tag or commit, for a hub id.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Dtype of the frozen base model.")
    load_in_8bit: bool = Field(
        False, description="Hold the base model's linear weights in 8 bits (needs the extra `fedllm[bitsandbytes]`)."
    )
    load_in_4bit: bool = Field(
        False, description="Hold them in 4 bits, type NF4, as QLoRA does (needs the extra `fedllm[bitsandbytes]`)."
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        None, description="Attention code of transformers; null: its choice, `sdpa` in families that have it."
    )
    base_digest: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 that every party's base model must have (`fedllm validate` prints it).",
    )

    @model_validator(mode="after")
    def _one_quantisation(self) -> ModelSettings:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit are both set; leave one out")
        return self

    @property
    def quantization(self) -> Literal["int8", "nf4"] | None:
        """How the base model's linear weights are held; None: as `dtype` says."""
        return "int8" if self.load_in_8bit else "nf4" if self.load_in_4bit else None


PeftType = Literal[
    "LORA",
    "ADALORA",
    "VERA",
    "IA3",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "LN_TUNING",
    "BOTTLENECK",
    "BITFIT",
    "FULL",
]
_WHERE: dict[str, Any] = {"target_modules": "all-linear", "modules_to_save": None}
_LORA: dict[str, Any] = {"lora_alpha": 16.0, "lora_dropout": 0.0, **_WHERE}
# Which settings a method has, and what they are where the job does not say. PEFT's defaults, but for target_modules.
DEFAULTS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 8, **_LORA, "use_rslora": False, "use_dora": False},
    "ADALORA": {"init_r": 12, "target_r": 8, "tinit": 0, "tfinal": 0, "orth_reg_weight": 0.5, **_LORA},
    "VERA": {"r": 256, "vera_dropout": 0.0, "d_initial": 0.1, **_WHERE},
    "IA3": {"target_modules": None, "feedforward_modules": None, "modules_to_save": None},
    "PREFIX_TUNING": {"num_virtual_tokens": 20, "prefix_projection": False, "encoder_hidden_size": None},
    "PROMPT_TUNING": {"num_virtual_tokens": 20},
    "P_TUNING": {"num_virtual_tokens": 20, "encoder_hidden_size": None},
    "LN_TUNING": {"target_modules": None, "modules_to_save": None},
    "BOTTLENECK": {"bottleneck_size": 64, "placement": "pfeiffer"},
    "BITFIT": {},
    "FULL": {},
}
# They put virtual tokens before the text.
PROMPT_TYPES = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
# They change the base model's own parameters, or put modules into it; PEFT has none of them.
OWN_TYPES = ("BOTTLENECK", "BITFIT", "FULL")
# What can be added to the base model's weights for good.
MERGING_TYPES = ("LORA", "ADALORA", "VERA", "IA3", "LN_TUNING", "BITFIT", "FULL")


class PeftSettings(BaseModel):
    """The tuning method and its sizes, under PEFT's names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    peft_type: PeftType = Field("LORA", description="Tuning method.")
    r: int | None = Field(
        None, ge=1, le=4096, description="LORA: rank of the factors, 8. VERA: of the shared ones, 256."
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="LORA, ADALORA: scale, 16: alpha / r, or alpha / sqrt(r) with rsLoRA."
    )
    lora_dropout: float | None = Field(
        None, ge=0, lt=1, description="LORA, ADALORA: dropout before the first factor, 0."
    )
    use_rslora: bool | None = Field(None, description="LORA: rank-stabilised scale alpha / sqrt(r).")
    use_dora: bool | None = Field(None, description="LORA: weight-decomposed LoRA.")
    init_r: int | None = Field(None, ge=1, le=1024, description="ADALORA: rank at the start, 12.")
    target_r: int | None = Field(None, ge=1, le=1024, description="ADALORA: mean rank at the end, 8.")
    tinit: int | None = Field(None, ge=0, description="ADALORA: rounds before ranks begin to shrink, 0.")
    tfinal: int | None = Field(None, ge=0, description="ADALORA: rounds at the end in which ranks stand, 0.")
    orth_reg_weight: float | None = Field(
        None, ge=0, description="ADALORA: weight of the penalty on factors that are not orthogonal, 0.5."
    )
    vera_dropout: float | None = Field(None, ge=0, lt=1, description="VERA: dropout, 0.")
    d_initial: float | None = Field(None, gt=0, description="VERA: first value of the inner scaling vector, 0.1.")
    num_virtual_tokens: int | None = Field(
        None, ge=1, le=4096, description="PREFIX_TUNING, PROMPT_TUNING, P_TUNING: virtual tokens, 20."
    )
    prefix_projection: bool | None = Field(
        None, description="PREFIX_TUNING: make the prefix by a small network (false is P-Tuning v2)."
    )
    encoder_hidden_size: int | None = Field(
        None,
        ge=1,
        description="P_TUNING, PREFIX_TUNING with projection: width of the small network; null: the model's.",
    )
    bottleneck_size: int | None = Field(None, ge=1, description="BOTTLENECK: width of the adapter's middle, 64.")
    placement: Literal["pfeiffer", "houlsby"] | None = Field(
        None, description="BOTTLENECK: after each block (pfeiffer), or also after its attention (houlsby)."
    )
    target_modules: str | list[str] | None = Field(
        None,
        description="LORA, ADALORA, VERA: `all-linear` (the default), a regular expression, or module names such as "
        "[q_proj, v_proj]. IA3, LN_TUNING: the same; null: PEFT's choice for the family, all norms.",
    )
    feedforward_modules: list[str] | None = Field(
        None, description="IA3: which of target_modules are scaled before, not after; null: PEFT's choice."
    )
    modules_to_save: list[str] | None = Field(
        None, description="Modules trained in full beside the adapter, and federated with it."
    )

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_method(cls, values: Any) -> Any:
        return with_own(values, cls.model_fields, key="peft_type", default="LORA", variants=DEFAULTS)

    @field_validator("target_modules")
    @classmethod
    def _targets_not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and not value:
            raise ValueError("nothing would be trained; try `all-linear`")
        return value

    @model_validator(mode="after")
    def _settings_hold_together(self) -> PeftSettings:
        if self.peft_type == "ADALORA" and (self.init_r or 0) < (self.target_r or 0):
            raise ValueError(f"init_r {self.init_r} is below target_r {self.target_r}: ranks only shrink")
        if self.peft_type == "PREFIX_TUNING" and self.encoder_hidden_size and not self.prefix_projection:
            raise ValueError("encoder_hidden_size has no effect without prefix_projection; leave it out")
        if self.feedforward_modules and self.target_modules is None:
            raise ValueError("feedforward_modules needs target_modules, which holds them; set it")
        return self

    def own(self) -> dict[str, Any]:
        """Return the settings that the method has, by name."""
        return {key: getattr(self, key) for key in DEFAULTS[self.peft_type]}
