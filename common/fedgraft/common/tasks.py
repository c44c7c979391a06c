"""The kinds of problems a job can have: what a model of one reads, and what it predicts."""

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["TASKS", "Modality", "Target", "Task", "TaskName"]

Modality = Literal["text", "image", "audio"]
Target = Literal["label", "tokens"]
TaskName = Literal[
    "text-classification", "image-classification", "audio-classification", "causal-lm"
]


@dataclass(frozen=True)
class Task:
    """A kind of problem.

    ``auto_class`` of transformers loads its model, which reads ``modality``. It predicts one of the
    job's labels for an example, or the ``tokens`` of a text, of which each is right or wrong.
    """

    auto_class: str
    modality: Modality
    target: Target = "label"


TASKS: dict[TaskName, Task] = {
    "text-classification": Task("AutoModelForSequenceClassification", "text"),
    "image-classification": Task("AutoModelForImageClassification", "image"),
    "audio-classification": Task("AutoModelForAudioClassification", "audio"),
    "causal-lm": Task("AutoModelForCausalLM", "text", "tokens"),
}
assert set(TASKS) == set(get_args(TaskName))  # noqa: S101  # at import: none may be forgotten
