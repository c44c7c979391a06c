"""The contract of what a task measures: what is counted, batch by batch, and what comes of it.

A ``Measures`` says what a job counts. Its ``Collector`` takes batches at a site and gives an
``Evaluation``, which stays there. Only its ``Tally``, sums, may leave.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from fedgraft.common.examples import Examples, Indices
from fedgraft.common.metrics.tally import Counted, Counts, Tally
from fedgraft.common.metrics.verdict import Rival

__all__ = ["PARTS_LIMIT", "TALLY_LIMIT", "Collector", "Evaluation", "Measures"]

TALLY_LIMIT = 131072.0  # nats: the largest sum of losses over one site's validation examples
PARTS_LIMIT = 2.0**24  # the same over its tokens, of which an example has hundreds


class Evaluation(Protocol):
    """What a model came to on a site's examples."""

    @property
    def tally(self) -> Tally:
        """The sums."""

    def intervals(self, generator: np.random.Generator) -> dict[str, Any]:
        """95 % intervals of figures, as ``KEY_interval``; draws come from ``generator``."""

    def compare(
        self, other: Self, generator: np.random.Generator, *, name: str, rival: Rival
    ) -> dict[str, Any]:
        """This model, the federated one, against ``other`` on the same examples of site ``name``.

        A ``Verdict`` as a dictionary, and what else can be said of the difference.
        """

    def joined(self, others: Sequence[Self]) -> Self:
        """The examples of this one and of ``others`` as one, in order."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, which ``Measures.evaluation`` reads."""


class Collector(Protocol):
    """Takes what a model predicts, batch by batch."""

    def add(self, index: Indices, found: Mapping[str, Any]) -> None:
        """Take the batch of the examples at ``index``: what the objective's ``counts`` gave."""

    def evaluation(self) -> Any:
        """All of them."""


class Measures(Counted, Protocol):
    """What a job counts. An example has up to ``most_parts`` parts that are counted."""

    @property
    def most_parts(self) -> int:
        """The most parts of an example."""

    @property
    def loss_limit(self) -> float:
        """The largest sum of losses over one site's validation examples."""

    @property
    def named(self) -> tuple[str, ...]:
        """What is counted beside the confusion matrix, as terms of a masked round name it."""

    def collect(self, examples: Examples) -> Collector:
        """Takes what a model predicts for ``examples``."""

    def evaluation(self, value: Mapping[str, Any]) -> Any:
        """The evaluation that ``to_json`` wrote."""

    def figures(self, tally: Tally) -> dict[str, Any]:
        """All that ``tally`` says of a model, by the keys of its metrics; ``loss`` is the mean."""

    def without_few(self, counts: Counts) -> Counts:
        """``counts`` beside the confusion matrix without what too few examples are in."""
