"""The contract of a task: everything the rest of the house asks of it.

One file has one task, or several that differ only in what they read. A task is one object without
state; ``TASKS`` in this package names them. What a task cannot do stands in its ``refuses``, by the
names of ``config/compatibility.py``, and nowhere else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from fedgraft.common.encoding import Draws, Keep, Rows, Settings
from fedgraft.common.errors import BackboneError
from fedgraft.common.examples import Examples, Inputs
from fedgraft.common.metrics.evaluation import Measures
from fedgraft.common.metrics.metric import Metric
from fedgraft.common.modalities import Modality, Processor
from fedgraft.common.section import IllegalJob, Refuses

__all__ = ["Cell", "Corrupt", "Differences", "Reading", "Task"]

Corrupt = Callable[[Inputs, Any, Draws], tuple[Inputs, Any]]
"""Inputs and targets of a batch, as they are seen this time; draws are the site's own."""


@dataclass(frozen=True)
class Cell:
    """One row as its file has it: what is read, and what stands ``beside`` it (None without).

    ``typed`` says that the file tells the number 3 from the text "3"; CSV cells and names of
    folders do not.
    """

    content: Any
    beside: Any
    typed: bool


@dataclass(frozen=True)
class Reading:
    """How the cells of one file set are read.

    ``labels`` are the job's, ``mapping`` maps a value of the site's to one of them. ``labelled``:
    the rows have labels at all.
    """

    labels: tuple[str, ...]
    mapping: Mapping[str, str]
    labelled: bool = True

    @cached_property
    def indices(self) -> dict[str, int]:
        """The index of each label."""
        return {name: index for index, name in enumerate(self.labels)}


@dataclass(frozen=True)
class Differences:
    """How the report's table of differences to other models reads.

    ``caption`` goes on from "Federated minus the other model,"; ``heads`` are of the columns: the
    difference, the p-value of its test and, where there is one, that of macro F1. ``points``: the
    difference is of shares, in percentage points.
    """

    caption: str
    heads: tuple[str, ...]
    points: bool


class Task(ABC):
    """A kind of problem: what a model reads, what it predicts, how it is loaded and measured.

    ``auto_class`` of transformers loads the model, which reads ``modality``; ``target`` names the
    objective (``client/objectives.py``) and ``peft_type`` is how PEFT calls the task. ``beside`` is
    the key of ``[data]`` that names the column beside what is read, and ``keys`` are keys of
    ``[data]`` that only this task has, with their defaults: names of columns, or numbers.

    ``metrics`` are shown of a model, the headline first; one of the two is a share. ``examples``,
    ``example_words`` and ``reading`` are words of the report.
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
    """Whether each example has one of the job's labels."""
    wants_labels: bool = False
    """Whether a job names labels at all."""
    head_trains: bool = True
    """Whether the head is made for the task; else it is the backbone's own."""
    head_alone: bool = True
    """Whether training only the head, the backbone a feature extractor, means something."""
    hidden_share: float = 0.0
    """The share of an example's parts that is hidden where a job does not say."""

    metrics: tuple[Metric, Metric]
    card_metrics: tuple[Metric, ...]
    """What the model card shows, in this order, where it was measured."""
    examples: str = "examples"
    person: str = "images"
    """What there are several of one person: they are fewer examples than they seem."""
    intervals: str
    verdicts: str
    """How the report explains intervals and verdicts."""
    differences: Differences
    pipeline: str
    use: str
    """What a person does with the model, after "To"; and how the Hugging Face hub calls it."""
    card_note: str = ""
    refuses: Refuses

    @property
    def share(self) -> Metric:
        """The metric that is a share: bars and curves are of it."""
        return next(one for one in self.metrics if one.percent)

    @property
    def content(self) -> str:
        """The key of ``[data]`` that names the column of what is read; rows call it so, too."""
        return self.modality.name

    @property
    def content_kind(self) -> str:
        """How rows store what is read."""
        return self.modality.kind

    def check_labels(self, labels: Sequence[str]) -> None:
        """Check the labels that a job names.

        Raises:
            IllegalJob: there are some and the task has none, or they do not do.
        """
        if not self.wants_labels and labels:
            raise IllegalJob(f"{self.name} has no labels", "leave job.labels out")
        if self.wants_labels and len(labels) < 2:
            raise IllegalJob(f"{self.name} needs at least two labels", "name them in job.labels")

    def check_keys(self, keys: Mapping[str, Any]) -> None:
        """Check the values of ``keys``, defaults filled in.

        Raises:
            IllegalJob: they contradict each other.
        """
        return

    def outputs(self, config: Any) -> int:
        """Numbers that a model with this configuration predicts at once, or at a position."""
        return int(getattr(config, "num_labels", 1))

    def check_cell(self, content: Any) -> None:
        """Check what is read of a row.

        Raises:
            DataError: it is empty, or cannot be read.
        """
        self.modality.check(content)

    @abstractmethod
    def read(self, cell: Cell, reading: Reading) -> dict[str, Any]:
        """What stands beside the content: ``label`` (int, 0 without) and the ``stored`` columns.

        Raises:
            DataError: it is missing, or not what the task asks for.
        """

    @abstractmethod
    def write(self, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """What ``read`` was given, by key of ``[data]``: as a site's file would have it."""

    @abstractmethod
    def encode(self, rows: Rows, processor: Any, settings: Settings, keep: Keep) -> Examples:
        """The examples of ``rows``.

        Raises:
            BackboneError: the settings do not fit the backbone.
            DataError: a row cannot be encoded.
        """

    def corruption(self, examples: Examples) -> Corrupt | None:
        """What changes a batch of ``examples`` each time it is trained on; None: nothing does."""
        return None

    @abstractmethod
    def measures(self, settings: Settings) -> Measures:
        """What a job with these settings counts."""

    def model_options(
        self, config: Mapping[str, Any], labels: Sequence[str], source: str
    ) -> dict[str, Any]:
        """What a backbone's ``config.json`` has to say besides; ``source`` names it in errors.

        Raises:
            BackboneError: no model of this kind does the task.
        """
        return {}

    def usage(self, labels: Sequence[str]) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` under which the backbone takes the adapter."""
        return {}

    def describe_input(self, processor: Processor, settings: Settings) -> str:
        """How the model card says what becomes of a cell."""
        return processor.describe(settings)

    def no_head(self, source: str) -> BackboneError:
        """What is wrong with a backbone that lacks the head that the task needs."""
        return BackboneError(
            f"{source} was saved without the head that {self.name} predicts with",
            hint="a backbone that still has it, such as the model that this one was made from",
        )
