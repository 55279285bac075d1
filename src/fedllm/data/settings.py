"""The `data` sections of job.yaml (how examples become tokens) and party.yaml (where they are)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedllm.data.formats import COLUMN_NAMES, LAYOUTS, canonical_columns
from fedllm.errors import nearest
from fedllm.tasks import CAUSAL_LM, CLASSIFICATION, TaskName

Format = Literal["auto", "messages", "prompt_completion", "instruction", "sharegpt", "text", "classification"]


# A row of an encoder and a decoder, or of a classifier, is one example with one answer.
_CAUSAL_ONLY = ("packing", "completion_only_loss", "assistant_only_loss")


def local_path(source: str, base_dir: Path) -> Path:
    """Return where a path of a setting leads on this machine.

    Args:
        source: As written; `~` is the user's home.
        base_dir: Where relative paths start.
    """
    try:
        return base_dir / Path(source).expanduser()
    except RuntimeError:  # `~name` of nobody
        return base_dir / source


class DataSettings(BaseModel):
    """How every party turns its examples into tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    task: TaskName = Field(
        default=CAUSAL_LM,
        description="What is learnt from the examples: to continue a text (causal_lm), to answer by an encoder and a "
        "decoder (seq2seq_lm), or to choose a label (sequence_classification).",
    )
    labels: list[str] | None = Field(
        default=None,
        min_length=2,
        description="sequence_classification: every label that any party's examples may have, in order.",
    )
    max_length: int = Field(
        default=1024,
        ge=2,
        description="Tokens of an example, at most; the left part is kept. 2 or more. TRL's default.",
    )
    packing: bool = Field(
        default=False, description="Put several examples of a batch into one row, where they do not see one another."
    )
    completion_only_loss: bool = Field(
        default=True, description="Train on the completion, or the last assistant turn, and not on what is given."
    )
    assistant_only_loss: bool = Field(
        default=False, description="Train on every assistant turn of a chat, not on the last one only."
    )
    chat_template_path: str | None = Field(
        default=None,
        description="Jinja file (relative to job.yaml) used instead of the tokenizer's chat template; "
        "all parties need the same bytes.",
    )
    dataset_text_field: str = Field(default="text", min_length=1, description="Column that holds plain text.")
    group_by: str | None = Field(
        default=None,
        min_length=1,
        description="Column that names the person an example is of; for `privacy.differential_privacy.unit: group`.",
    )

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: list[str] | None) -> list[str] | None:
        if labels and (len(set(labels)) < len(labels) or not all(label.strip() for label in labels)):
            raise ValueError("two labels are the same, or one is empty; give each a name of its own")
        return labels

    @model_validator(mode="after")
    def _settings_of_the_task(self) -> Self:
        if (self.task == CLASSIFICATION) != (self.labels is not None):
            state = "missing" if self.labels is None else f"without effect for {self.task}"
            raise ValueError(f"labels is {state}; it goes with `task: {CLASSIFICATION}`")
        fields = type(self).model_fields
        for name in _CAUSAL_ONLY if self.task != CAUSAL_LM else ():
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} has no effect for {self.task}; leave it out")
        if self.task == CLASSIFICATION and self.chat_template_path is not None:
            raise ValueError(f"chat_template_path has no effect for {CLASSIFICATION}; leave it out")
        return self

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels in order; empty where the task has none."""
        return tuple(self.labels or ())

    def with_base_dir(self, base_dir: Path) -> DataSettings:
        """Return the same settings with `chat_template_path` made absolute.

        Args:
            base_dir: The folder of the job file.
        """
        if self.chat_template_path is None:
            return self
        path = str(local_path(self.chat_template_path, base_dir))
        return self.model_copy(update={"chat_template_path": path})


class DataSource(BaseModel):
    """Where a party's examples are. Stays at the party."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    train: str = Field(
        min_length=1,
        description="JSONL, JSON, CSV or Parquet file, a folder of such files, a folder made by `save_to_disk`, "
        "or a hub id such as org/name. Relative to party.yaml.",
    )
    train_split: str = Field(default="train", min_length=1, description="Split of a folder or hub id to train on.")
    eval: str | None = Field(
        default=None, min_length=1, description="Held-out examples, as `train`; null: a share of `train` is split off."
    )
    eval_split: str | None = Field(
        default=None, min_length=1, description="Split of `eval` (or of `train`, where `eval` is null) to evaluate on."
    )
    eval_share: float = Field(
        default=0.1, ge=0, lt=1, description="Share of `train` held out where no evaluation data are named; 0: none."
    )
    format: Format = Field(default="auto", description="Layout of the records; auto: seen from their columns.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Layout's column -> name in the file, for instance {prompt: question, completion: answer}.",
    )

    @model_validator(mode="after")
    def _share_has_an_effect(self) -> Self:
        named = self.eval is not None or self.eval_split is not None
        # Compared with the default, not with what was written: a run folder writes all values out.
        if named and self.eval_share not in (0, type(self).model_fields["eval_share"].default):
            raise ValueError("eval_share has no effect where eval or eval_split names the data: leave one out")
        return self

    @model_validator(mode="after")
    def _columns_fit_the_format(self) -> Self:
        check_columns(self.format, self.columns)
        return self


def check_columns(format_: str, columns: dict[str, str]) -> None:
    """Refuse a column mapping that no layout, or not the layout named, can use.

    Args:
        format_: `auto` or the name of a layout.
        columns: Layout's column -> name in the file.

    Raises:
        ValueError: With the nearest column name.
    """
    allowed = COLUMN_NAMES if format_ == "auto" else canonical_columns(format_)
    for column in columns:
        if column not in allowed:
            raise ValueError(f"columns: no layout {format_!r} has {column!r}; {nearest(column, allowed)}")
    if not any(set(columns) <= set(canonical_columns(name)) for name in LAYOUTS):
        raise ValueError(f"columns: {', '.join(columns)} belong to different layouts")
