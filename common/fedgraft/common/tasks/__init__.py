"""The tasks, which are the kinds of problem of a job: one file for each, and the table of all."""

from typing import TYPE_CHECKING, Literal

from fedgraft.common.modalities import MODALITIES
from fedgraft.common.tasks.base import Task
from fedgraft.common.tasks.causal_lm import CausalLm
from fedgraft.common.tasks.classification import Classification
from fedgraft.common.tasks.masked_image_modeling import MaskedImageModeling
from fedgraft.common.tasks.masked_lm import MaskedLm
from fedgraft.common.tasks.regression import Regression
from fedgraft.common.tasks.seq2seq_lm import Seq2SeqLm
from fedgraft.common.tasks.token_classification import TokenClassification

__all__ = ["TASKS", "Task", "TaskName"]

TASKS: dict[str, Task] = {
    "text-classification": Classification(MODALITIES["text"], "AutoModelForSequenceClassification"),
    "image-classification": Classification(MODALITIES["image"], "AutoModelForImageClassification"),
    "audio-classification": Classification(MODALITIES["audio"], "AutoModelForAudioClassification"),
    "video-classification": Classification(MODALITIES["video"], "AutoModelForVideoClassification"),
    "causal-lm": CausalLm(),
    "masked-lm": MaskedLm(),
    "seq2seq-lm": Seq2SeqLm(),
    "masked-image-modeling": MaskedImageModeling(),
    "token-classification": TokenClassification(),
    "text-regression": Regression(
        MODALITIES["text"], "AutoModelForSequenceClassification", "text-classification"
    ),
    "image-regression": Regression(
        MODALITIES["image"], "AutoModelForImageClassification", "image-classification"
    ),
}

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]
