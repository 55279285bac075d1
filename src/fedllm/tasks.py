"""What a model is tuned to do with a text. Models, data and jobs all speak of it."""

from __future__ import annotations

from typing import Literal

TaskName = Literal["causal_lm", "seq2seq_lm", "sequence_classification"]
CAUSAL_LM: TaskName = "causal_lm"
SEQ2SEQ_LM: TaskName = "seq2seq_lm"
CLASSIFICATION: TaskName = "sequence_classification"
