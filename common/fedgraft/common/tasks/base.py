"""The interface of a task: everything that the rest of the code needs from it.

One file contains one task, or several tasks that differ only in their modality. A task is one
object without state; ``TASKS`` in this package maps names to tasks. Only the task's ``refuses``
lists the settings that the task does not support, by the names in ``config/compatibility.py``.
"""

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.encoding import Draws, Keep, Rows, Settings
from fedgraft.common.errors import DataError
from fedgraft.common.examples import (
    Examples,
    ImageExamples,
    Indices,
    Inputs,
    Teachable,
    TextExamples,
)
from fedgraft.common.metrics.evaluation import Measures
from fedgraft.common.metrics.metric import Metric
from fedgraft.common.modalities import Modality, Processor
from fedgraft.common.section import IllegalJob, Refuses

__all__ = [
    "Cell",
    "Corrupt",
    "Differences",
    "Reading",
    "Task",
    "TextBlocks",
    "Wrapped",
    "composed",
    "count_marked",
    "is_number",
]

Corrupt = Callable[[Inputs, Any, Draws], tuple[Inputs, Any]]
"""A function that gives the inputs and targets of a batch for this training step.

The random draws are the site's own.
"""


def composed(value: Any) -> str:
    """Return a value as text in composed form (NFC), in which equal words are equal."""
    return unicodedata.normalize("NFC", str(value))


def is_number(name: str) -> bool:
    """Return whether the name of a label is a number."""
    try:
        float(name)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Cell:
    """One row of a file: its content, and the value in the column ``beside`` it (None if absent).

    ``typed``: the file distinguishes the number 3 from the text "3"; CSV cells and names of folders
    do not.
    """

    content: Any
    beside: Any
    typed: bool


@dataclass(frozen=True)
class Reading:
    """The settings for reading the cells of one file set.

    ``labels`` are the job's labels. ``mapping`` maps a value of the site to one of these labels.
    ``labelled``: the rows have labels. ``keys`` are the task's keys of ``[data]``, by name.
    """

    labels: tuple[str, ...]
    mapping: Mapping[str, str]
    labelled: bool = True
    keys: Mapping[str, Any] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    """How labels were read so far, ``names`` or ``indices``; empty before the first label."""

    @cached_property
    def indices(self) -> dict[str, int]:
        """Return the index of each label, by its composed name."""
        return {composed(name): index for index, name in enumerate(self.labels)}

    @cached_property
    def mapped(self) -> dict[str, str]:
        """Return ``mapping`` with composed names."""
        return {composed(value): composed(name) for value, name in self.mapping.items()}

    @cached_property
    def numbered(self) -> bool:
        """Return whether a label of the job is a number; a number is then a name."""
        return any(is_number(name) for name in self.labels)

    def take(self, how: Literal["names", "indices"]) -> None:
        """Note how a label was read.

        Raises:
            DataError: an earlier label was read in the other way.
        """
        if self.taken and self.taken[0] != how:
            raise DataError(
                f"a label here is one of the job's {how}, and labels before it are {self.taken[0]}",
                hint="write the names of the job's labels in every row, or map them in "
                "[data.labels] of site.toml",
            )
        self.taken[:] = [how]


@dataclass(frozen=True)
class Differences:
    """The texts of the report's table of differences to other models.

    ``caption`` continues the words "Federated minus the other model,". ``heads`` are the headings
    of the columns: the difference, the p-value of its test and, if it exists, the difference of
    macro F1. ``points``: the difference is between shares, in percentage points.
    """

    caption: str
    heads: tuple[str, ...]
    points: bool


@dataclass(frozen=True)
class Wrapped(Teachable):
    """Examples made from ``source``, with targets of another kind than one label per example.

    The targets follow from the source, or they are stored beside it.
    """

    source: TextExamples | ImageExamples

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> Indices:
        """Return zeros: there are no labels."""
        return self.source.labels

    @property
    def groups(self) -> None:
        """Return None: only labelled examples have groups."""
        return None

    @property
    def lengths(self) -> Indices:
        """Return the lengths of ``source``."""
        return self.source.lengths

    @property
    def longest(self) -> int:
        """Return the most tokens of an example in ``source``."""
        return self.source.longest

    @property
    def pad_left(self) -> bool:
        """Return whether padding of ``source`` is before the tokens."""
        return self.source.pad_left

    def padded_right(self) -> Self:
        """Return the same examples with padding after the tokens of ``source``."""
        return replace(self, source=self.source.padded_right())

    def width(self, index: Indices) -> int:
        """Return the length of the longest example at ``index``."""
        return int(self.lengths[index].max(initial=0))


@dataclass(frozen=True)
class TextBlocks(Wrapped):
    """Blocks of texts; ``of``, int64 [n], is the number of the text of each block."""

    source: TextExamples
    of: Indices

    @property
    def documents(self) -> Indices:
        """Return ``of``."""
        return self.of

    def joined_documents(self, others: "Sequence[TextBlocks]") -> Indices:
        """Return the documents of these blocks and of ``others``, int64, with other numbers."""
        every = [np.unique(one.of, return_inverse=True)[1] for one in (self, *others)]
        sizes = [int(one.max(initial=-1)) + 1 for one in every]
        before = np.cumsum([0, *sizes[:-1]])
        return np.concatenate([one + first for one, first in zip(every, before, strict=True)])


def count_marked(marked: NDArray[np.bool_], source: TextExamples) -> int:
    """Return how many tokens of ``source``'s examples are ``marked``, bool [tokens of source].

    A token that stands in two examples counts twice.
    """
    before = np.concatenate([[0], np.cumsum(marked)])
    return int((before[source.starts + source.lengths] - before[source.starts]).sum())


class Task(ABC):
    """A kind of problem: it defines the model's input, its prediction, its loading and its metrics.

    ``auto_class`` is the transformers class that loads the model. The model reads ``modality``.
    ``target`` is the name of the objective (``client/objectives.py``), and ``peft_type`` is PEFT's
    name of the task. ``beside`` is the key of ``[data]`` with the name of the column beside the
    content. ``keys`` are the keys of ``[data]`` that only this task has, with their defaults: names
    of columns, or numbers.

    ``metrics`` are two metrics, the headline first; at least one is a share.
    """

    name: str
    auto_class: str
    modality: Modality
    target: str
    peft_type: str | None = None
    beside: str | None = None
    keys: Mapping[str, str | float] = MappingProxyType({})
    stored: Mapping[str, str] = MappingProxyType({})
    """Columns of rows beside content and label, with their kinds (``client.data.rows.KINDS``)."""

    labelled: bool = False
    """True if each example has one of the job's labels."""
    wants_labels: bool = False
    """True if a job must list labels."""
    head_trains: bool = True
    """True if the head is new for the task; otherwise it is the backbone's own head."""
    head_alone: bool = True
    """True if head-only training, with the backbone as feature extractor, is meaningful."""
    hidden_share: float = 0.0
    """The share of an example's parts that is hidden if a job does not set it."""

    metrics: tuple[Metric, Metric]
    card_metrics: tuple[Metric, ...]
    """The metrics in the model card, in this order; a metric that was not measured is left out."""
    examples: str = "examples"
    """The report's word for the examples that intervals take as independent draws."""
    intervals: str
    """The report's explanation of intervals."""
    verdicts: str
    """The report's explanation of verdicts."""
    differences: Differences
    pipeline: str
    """The Hugging Face hub's name of the model's use."""
    use: str
    """The model's use, after the word "To"."""
    card_note: str = ""
    """The model card's explanation of the metrics; it ends with a space if it is not empty."""
    refuses: Refuses

    @property
    def own_keys(self) -> Mapping[str, str | float]:
        """Return the keys of ``[data]`` that jobs of other tasks may lack, with their defaults."""
        return {**self.modality.keys, **self.keys}

    @property
    def watched(self) -> tuple[Metric, ...]:
        """Return the metrics beside the loss that early stopping can watch."""
        return self.metrics

    @property
    def person(self) -> str:
        """Return the report's word for several inputs from one person: they are not independent."""
        return self.modality.several

    @property
    def share(self) -> Metric:
        """Return the metric that is a share; bars and curves show it."""
        return next(one for one in self.metrics if one.percent)

    @property
    def content(self) -> str:
        """Return the key of ``[data]`` for the content column; rows use the same name."""
        return self.modality.name

    @property
    def content_kind(self) -> str:
        """Return the kind of storage for the content in rows."""
        return self.modality.kind

    def check_labels(self, labels: Sequence[str]) -> None:
        """Check the labels in a job.

        Raises:
            IllegalJob: there are labels and the task has none, or the labels are not valid.
        """
        if not self.wants_labels and labels:
            raise IllegalJob(f"{self.name} has no labels", "leave job.labels out")
        if self.wants_labels and len(labels) < 2:
            raise IllegalJob(f"{self.name} needs at least two labels", "name them in job.labels")

    def check_keys(self, keys: Mapping[str, Any]) -> None:
        """Check the values of ``keys``, with defaults filled in.

        Raises:
            IllegalJob: the values contradict each other.
        """
        return

    def outputs(self, config: Any) -> int:
        """Return the number of values that a model predicts for an example, or for a position."""
        return int(getattr(config, "num_labels", 1))

    def check_cell(self, content: Any) -> None:
        """Check the content of a row.

        Raises:
            DataError: the content is empty or cannot be read.
        """
        self.modality.check(content)

    @abstractmethod
    def read(self, cell: Cell, reading: Reading) -> dict[str, Any]:
        """Return the values beside the content: ``label`` (0 if none) and the ``stored`` columns.

        ``label`` is an int.

        Raises:
            DataError: a value is missing, or is not what the task needs.
        """

    @abstractmethod
    def write(self, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """Return the input of ``read`` by keys of ``[data]``, as a site's file would contain it."""

    @abstractmethod
    def encode(self, rows: Rows, processor: Any, settings: Settings, keep: Keep) -> Examples:
        """Return the examples of ``rows``.

        Raises:
            BackboneError: the settings do not fit the backbone.
            DataError: a row cannot be encoded.
        """

    def corruption(self, examples: Examples) -> Corrupt | None:
        """Return a function that changes a batch in each training step, or None.

        It depends only on the settings with which ``examples`` were encoded, so the function of one
        site is used for all sites of a pass.
        """
        return None

    @abstractmethod
    def measures(self, settings: Settings) -> Measures:
        """Return the measures of a job with these settings: the numbers that it counts."""

    def model_options(
        self, config: Mapping[str, Any], labels: Sequence[str], source: str
    ) -> dict[str, Any]:
        """Return additions to a backbone's ``config.json``; ``source`` is its name in errors.

        Raises:
            BackboneError: no model of this kind can do the task.
        """
        return {}

    def knows_head(
        self, config: Mapping[str, Any], named: Sequence[str | None], labels: Sequence[str]
    ) -> bool:
        """Return whether a head in a backbone's folder was trained for this task and ``labels``.

        ``named`` are the labels that the folder's ``config.json`` gives to the head's outputs.
        """
        return not labels or list(named) == list(labels)

    def usage(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained`` so that the backbone accepts the adapter."""
        return {}

    def blank(self, processor: Processor, settings: Settings) -> Inputs:
        """Return one example of full length without content, as the model reads it."""
        return processor.blank(settings)

    def describe_input(self, processor: Processor, settings: Settings) -> str:
        """Return the model card's text about the conversion of cells."""
        return processor.describe(settings)
