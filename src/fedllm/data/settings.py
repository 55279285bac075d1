"""The `data` sections of job.yaml (how examples become tokens) and party.yaml (where they are)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedllm.data.formats import COLUMN_NAMES, LAYOUTS, canonical_columns
from fedllm.errors import nearest

Format = Literal["auto", "messages", "prompt_completion", "instruction", "sharegpt", "text"]


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
