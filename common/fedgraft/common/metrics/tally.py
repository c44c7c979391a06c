"""The quality of a model as sums, which can be merged exactly over sites.

The ``Tally`` of several sites is the sum of their tallies: accuracy and macro F1 over the pooled
examples follow from the summed confusion matrix, and no example leaves its site. The measures of a
task define its additional counts beside the confusion matrix.
"""

from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.errors import MessageError

__all__ = ["Counted", "Counts", "Tally"]

Counts = NDArray[np.int64]

LARGEST = 2.0**40  # of any count: sums stay exact in int64 and float64


class Counted(Protocol):
    """The counts of a job: the shape of its tallies."""

    @property
    def classes(self) -> int:
        """Return the number of rows, and of columns, of the confusion matrix."""

    @property
    def size(self) -> int:
        """Return the number of additional counts beside the confusion matrix."""

    def fits(self, tally: "Tally") -> bool:
        """Return whether the additional counts can belong to the confusion matrix."""


@dataclass(frozen=True)
class Tally:
    """Sums over examples: ``loss`` (nats) and ``confusion``, int64 [classes, classes].

    ``confusion[i, j]`` is the number of examples of true class i that were predicted as j.
    ``more``, int64 [``Counted.size``], are the additional counts of the job.
    """

    loss: float
    confusion: NDArray[np.int64]
    more: Counts = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def empty(cls, measures: Counted) -> Self:
        """Return a tally of no examples."""
        square = (measures.classes, measures.classes)
        return cls(0.0, np.zeros(square, np.int64), np.zeros(measures.size, np.int64))

    @classmethod
    def of(
        cls, loss: float, true: Counts, predicted: Counts, n: int, more: Counts | None = None
    ) -> Self:
        """Return the tally of predictions, both int64 [examples], of ``n`` classes."""
        confusion = np.zeros((n, n), np.int64)
        np.add.at(confusion, (true, predicted), 1)
        return cls(loss, confusion, np.zeros(0, np.int64) if more is None else more)

    def __add__(self, other: "Tally") -> "Tally":
        confusion, more = self.confusion + other.confusion, self.more + other.more
        return Tally(self.loss + other.loss, confusion, more)

    @property
    def examples(self) -> int:
        """Return the number of examples."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Return the number of correctly predicted examples."""
        return int(np.trace(self.confusion))

    @property
    def accuracy(self) -> float:
        """Return the share of correctly predicted examples; 0 without examples."""
        return self.correct / max(self.examples, 1)

    @property
    def mean_loss(self) -> float:
        """Return the mean cross entropy in nats; 0 without examples."""
        return self.loss / max(self.examples, 1)

    @property
    def macro_f1(self) -> float:
        """Return the mean F1 over the classes that are true or predicted; 0 without examples.

        A class that is predicted and never true has F1 0, as in scikit-learn's ``f1_score``.
        """
        return float(self._f1()[0].mean()) if self.examples else 0.0

    @property
    def weighted_f1(self) -> float:
        """Return the mean F1 over the classes, weighted by their examples; 0 without examples."""
        f1, support = self._f1()
        return float((f1 * support).sum() / support.sum()) if self.examples else 0.0

    @property
    def balanced_accuracy(self) -> float:
        """Return the mean recall over the classes among the true labels; 0 without examples."""
        support = self.confusion.sum(1)
        present = support > 0
        recall = np.diag(self.confusion)[present] / support[present]
        return float(recall.mean()) if self.examples else 0.0

    def _f1(self) -> tuple[NDArray[np.float64], Counts]:
        """Return F1 and true examples of the classes that are true or predicted, both [present]."""
        right = np.diag(self.confusion).astype(np.float64)
        true, predicted = self.confusion.sum(1), self.confusion.sum(0)
        present = true + predicted > 0
        return 2 * right[present] / (true + predicted)[present], true[present]

    def summary(self) -> dict[str, float]:
        """Return accuracies and F1 scores (0..1), and the mean ``loss`` (nats)."""
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "weighted_f1": self.weighted_f1,
            "balanced_accuracy": self.balanced_accuracy,
            "loss": self.mean_loss,
        }

    @property
    def counts(self) -> Counts:
        """Return all counts in one vector [classes^2 + size].

        The confusion matrix comes first, by rows; the additional counts follow.
        """
        return np.concatenate([self.confusion.reshape(-1), self.more])

    @classmethod
    def of_counts(cls, loss: float, counts: Counts, measures: Counted) -> Self:
        """Return the tally with these ``counts``.

        Raises:
            MessageError: some counts are negative, or the counts contradict each other.
        """
        classes = measures.classes
        confusion, more = counts[: classes**2].reshape(classes, classes), counts[classes**2 :]
        tally = cls(loss, confusion, more)
        if (confusion < 0).any():
            raise MessageError("negative counts")
        if not measures.fits(tally):
            raise MessageError("counts that contradict one another")
        return tally

    def to_vector(self) -> NDArray[np.float64]:
        """Return one float64 vector [1 + classes^2 + size]: the loss, then ``counts``."""
        return np.concatenate([[self.loss], self.counts]).astype(np.float64)

    @classmethod
    def from_vector(cls, vector: NDArray[np.float64], measures: Counted) -> Self:
        """Return the tally that ``to_vector`` wrote.

        Raises:
            MessageError: wrong length, not finite, too large, or counts that are not whole numbers.
        """
        if vector.dtype != np.float64 or vector.shape != (1 + measures.classes**2 + measures.size,):
            raise MessageError("a metrics vector has the wrong length or type")
        if not np.isfinite(vector).all() or (np.abs(vector) > LARGEST).any():
            raise MessageError("a metrics vector is not finite or absurdly large")
        counts = vector[1:].astype(np.int64)
        if (counts != vector[1:]).any():
            raise MessageError("a metrics vector holds counts that are not whole numbers")
        return cls.of_counts(float(vector[0]), counts, measures)
