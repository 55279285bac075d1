"""The job's `train` section: local training, under the names of `transformers.TrainingArguments`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TrainSettings(BaseModel):
    """What each party does in a round."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    local_steps: int | None = Field(None, ge=1, description="Optimiser steps per round. Give this or local_epochs.")
    local_epochs: int | None = Field(None, ge=1, description="Passes over the party's data per round.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate of the local optimiser.")
    lr_scheduler_type: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ] = Field("cosine", description="Schedule over the whole run, not afresh each round.")
    warmup_steps: float = Field(0, ge=0, description="Warm-up steps of the whole run; below 1, a share of it.")
    per_device_train_batch_size: int = Field(8, ge=1, description="Examples per forward pass.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes per optimiser step.")
    optim: Literal["adamw_torch", "sgd", "adafactor"] = Field("adamw_torch", description="Local optimiser.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, on matrices only.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(1.0, ge=0, description="Largest gradient norm; 0 for no limit.")
    optimizer_state: Literal["keep", "reset"] = Field(
        "keep", description="Whether the local optimiser's state lives on from round to round."
    )
    loss_normalization: Literal["tokens", "examples"] = Field(
        "tokens", description="A step's loss: mean over its target tokens (as transformers), or mean of example means."
    )
    bf16: bool = Field(False, description="bfloat16 autocast; refused where the hardware has none.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations to save memory.")

    @model_validator(mode="after")
    def _one_length(self) -> TrainSettings:
        if (self.local_steps is None) == (self.local_epochs is None):
            state = "both given" if self.local_steps else "both missing"
            raise ValueError(f"local_steps and local_epochs are {state}; give one of them, both are per round")
        return self

    @model_validator(mode="after")
    def _settings_have_effect(self) -> TrainSettings:
        # Compared with the defaults, not with what was written: a run folder writes all values out.
        fields = type(self).model_fields
        adam = [name for name in fields if name.startswith("adam_") and getattr(self, name) != fields[name].default]
        if adam and self.optim != "adamw_torch":
            raise ValueError(f"{', '.join(adam)} has no effect with optim {self.optim}; leave it out")
        if self.lr_scheduler_type == "constant" and self.warmup_steps:
            raise ValueError("warmup_steps has no effect with constant; use constant_with_warmup")
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= 1e-7:
            raise ValueError("polynomial ends at a learning rate of 1e-7; begin above it, or use linear")
        return self


# Words of other tools, with what they are called here.
HINTS: dict[str, str] = {
    "max_steps": "steps of the whole run are num_rounds x local_steps: set `local_steps` (per round)",
    "num_train_epochs": "passes are per round here: set `local_epochs`, and `federation.num_rounds`",
    "warmup_ratio": "set `warmup_steps` below 1: a share of the run",
    "batch_size": "it is called `per_device_train_batch_size`",
    "lr": "it is called `learning_rate`",
    "clip_norm": "gradient clipping is `max_grad_norm`",
}
