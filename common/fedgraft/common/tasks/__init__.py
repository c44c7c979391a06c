"""The kinds of problems a job can have: what a model of one reads, predicts and is measured by."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["METRICS", "TASKS", "Metric", "Modality", "Target", "Task", "TaskName"]

Modality = Literal["text", "image", "audio", "video"]
Target = Literal["label", "tokens", "patches"]
TaskName = Literal[
    "text-classification",
    "image-classification",
    "audio-classification",
    "video-classification",
    "causal-lm",
    "masked-lm",
    "seq2seq-lm",
    "masked-image-modeling",
]


@dataclass(frozen=True)
class Metric:
    """A figure of a model as tables show it: its ``key`` in a summary, and its ``name``."""

    key: str
    name: str
    percent: bool

    @property
    def title(self) -> str:
        """The name as a sentence begins with it."""
        return self.name[:1].upper() + self.name[1:]

    def text(self, value: float | None, missing: str = "-", unit: str = " %") -> str:
        """``value`` with one decimal of a percent, or in about four digits."""
        if value is None or not math.isfinite(value):
            return missing
        if self.percent:
            return f"{100 * value:.1f}{unit}"
        if abs(value) < 1000:
            return f"{value:.2f}"
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.2g}"


METRICS: dict[Target, tuple[Metric, Metric]] = {
    "label": (Metric("accuracy", "accuracy", True), Metric("macro_f1", "macro F1", True)),
    "tokens": (
        Metric("perplexity", "perplexity", False),
        Metric("accuracy", "token accuracy", True),
    ),
    "patches": (
        Metric("loss", "reconstruction error", False),
        Metric("accuracy", "close patches", True),
    ),
}
"""What is shown of a model, the headline first. ``accuracy`` is of all: figures are of it."""


@dataclass(frozen=True)
class Task:
    """A kind of problem.

    ``auto_class`` of transformers loads its model, which reads ``modality``. It predicts one of the
    job's labels for an example, or the ``tokens`` of a text, of which each is right or wrong: all
    in turn, or those that are hidden if it is ``masked``; or hidden ``patches`` of an image, each
    close or not. A text has a second one beside it, its target, if it is ``paired``. ``peft`` is
    how PEFT calls it.
    """

    auto_class: str
    modality: Modality
    target: Target = "label"
    paired: bool = False
    masked: bool = False
    peft: str | None = None

    @property
    def metrics(self) -> tuple[Metric, Metric]:
        """What tables show of a model, the headline first."""
        return METRICS[self.target]


TASKS: dict[TaskName, Task] = {
    "text-classification": Task("AutoModelForSequenceClassification", "text"),
    "image-classification": Task("AutoModelForImageClassification", "image"),
    "audio-classification": Task("AutoModelForAudioClassification", "audio"),
    "video-classification": Task("AutoModelForVideoClassification", "video"),
    "causal-lm": Task("AutoModelForCausalLM", "text", "tokens", peft="CAUSAL_LM"),
    "masked-lm": Task("AutoModelForMaskedLM", "text", "tokens", masked=True),
    "seq2seq-lm": Task("AutoModelForSeq2SeqLM", "text", "tokens", paired=True, peft="SEQ_2_SEQ_LM"),
    "masked-image-modeling": Task(
        "AutoModelForMaskedImageModeling", "image", "patches", masked=True
    ),
}
assert set(TASKS) == set(get_args(TaskName))  # noqa: S101  # at import: none may be forgotten
