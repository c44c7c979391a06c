"""The interface of a task's measures: the counts of each batch, and the metrics from these counts.

A ``Measures`` defines the counts of a job. Its ``Collector`` takes batches at a site and returns an
``Evaluation``, which stays at the site. Only the evaluation's ``Tally``, which consists of sums,
may leave.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from fedgraft.common.examples import Examples, Indices
from fedgraft.common.metrics.tally import Counted, Counts, Tally
from fedgraft.common.metrics.verdict import Rival

__all__ = ["PARTS_LIMIT", "TALLY_LIMIT", "Collector", "Evaluation", "Measures"]

TALLY_LIMIT = 131072.0  # nats: the largest sum of losses over one site's validation examples
PARTS_LIMIT = 2.0**24  # the same over tokens: an example has hundreds


class Evaluation(Protocol):
    """The results of a model on a site's examples."""

    @property
    def tally(self) -> Tally:
        """Return the sums."""

    def intervals(self, generator: np.random.Generator) -> dict[str, Any]:
        """Return 95 % intervals of metrics, as ``KEY_interval``.

        ``generator`` is the source of the random draws.
        """

    def compare(
        self, other: Self, generator: np.random.Generator, *, name: str, rival: Rival
    ) -> dict[str, Any]:
        """Compare this model, the federated one, with ``other`` on the same examples.

        ``name`` is the site. Return a ``Verdict`` as a dictionary, and further facts about the
        difference.
        """

    def joined(self, others: Sequence[Self]) -> Self:
        """Return one evaluation of the examples of this one and of ``others``, in order."""

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON values, which ``Measures.evaluation`` reads."""


class Collector(Protocol):
    """A collector of a model's predictions, batch by batch."""

    def add(self, index: Indices, found: Mapping[str, Any]) -> None:
        """Add the batch of the examples at ``index``.

        ``found`` is the output of the objective's ``counts``.
        """

    def evaluation(self) -> Any:
        """Return the evaluation of all added examples."""


class Measures(Counted, Protocol):
    """The counts of a job. Up to ``most_parts`` parts of an example are counted."""

    @property
    def most_parts(self) -> int:
        """Return the largest number of parts of an example."""

    @property
    def loss_limit(self) -> float:
        """Return the largest sum of losses over one site's validation examples."""

    @property
    def named(self) -> tuple[str, ...]:
        """Return the names of the additional counts, as the terms of a masked round list them.

        Additional counts are all counts except the confusion matrix.
        """

    def collect(self, examples: Examples) -> Collector:
        """Return a collector of a model's predictions for ``examples``."""

    def evaluation(self, value: Mapping[str, Any]) -> Any:
        """Return the evaluation that ``to_json`` wrote."""

    def figures(self, tally: Tally) -> dict[str, Any]:
        """Return all metrics of a model from ``tally``, by their keys; ``loss`` is the mean."""

    def without_few(self, counts: Counts) -> Counts:
        """Return the additional ``counts`` without those over too few examples."""
