"""What a model is tuned to do with a text. Models, data and jobs all speak of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TaskName = Literal["causal_lm", "seq2seq_lm", "sequence_classification"]
CAUSAL_LM: TaskName = "causal_lm"
SEQ2SEQ_LM: TaskName = "seq2seq_lm"
CLASSIFICATION: TaskName = "sequence_classification"


@dataclass(frozen=True)
class Task:
    """A task, and the labels of a classifier in their order."""

    name: TaskName = CAUSAL_LM
    labels: tuple[str, ...] = ()


# The class of transformers that loads a model for it.
AUTO_CLASSES: dict[TaskName, str] = {
    CAUSAL_LM: "AutoModelForCausalLM",
    SEQ2SEQ_LM: "AutoModelForSeq2SeqLM",
    CLASSIFICATION: "AutoModelForSequenceClassification",
}
LANGUAGE = Task()
