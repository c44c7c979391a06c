"""How good a model is, kept as sums so that sites can be merged exactly.

A ``Tally`` of several sites is the sum of their tallies: accuracy and macro F1 of the pooled
examples follow from the summed confusion matrix, without any example leaving its site.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.errors import MessageError

__all__ = ["Tally"]

LARGEST = 2.0**40  # of any count: sums of them stay exact in int64 and float64


@dataclass(frozen=True)
class Tally:
    """Sums over examples: ``loss`` (nats) and ``confusion`` int64 [classes, classes].

    ``confusion[i, j]`` counts examples of true class i that were predicted as j.
    """

    loss: float
    confusion: NDArray[np.int64]

    @classmethod
    def empty(cls, classes: int) -> Self:
        """No examples yet."""
        return cls(0.0, np.zeros((classes, classes), np.int64))

    @classmethod
    def of(cls, loss: float, true: NDArray[np.int64], predicted: NDArray[np.int64], n: int) -> Self:
        """Tally predictions, both int64 [examples], of ``n`` classes."""
        confusion = np.zeros((n, n), np.int64)
        np.add.at(confusion, (true, predicted), 1)
        return cls(loss, confusion)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.loss + other.loss, self.confusion + other.confusion)

    @property
    def examples(self) -> int:
        """How many examples were counted."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """How many were predicted right."""
        return int(np.trace(self.confusion))

    @property
    def accuracy(self) -> float:
        """Share predicted right; 0 without examples."""
        return self.correct / max(self.examples, 1)

    @property
    def mean_loss(self) -> float:
        """Mean cross entropy in nats; 0 without examples."""
        return self.loss / max(self.examples, 1)

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that occur among the true labels; 0 without examples."""
        right = np.diag(self.confusion).astype(np.float64)
        true, predicted = self.confusion.sum(1), self.confusion.sum(0)
        present = true > 0
        if not present.any():
            return 0.0
        return float((2 * right[present] / (true + predicted)[present]).mean())

    def summary(self) -> dict[str, float]:
        """``accuracy``, ``macro_f1`` (0..1) and mean ``loss`` (nats)."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1, "loss": self.mean_loss}

    def to_vector(self) -> NDArray[np.float64]:
        """As one float64 vector [1 + classes^2]: the loss, then the confusion matrix by rows."""
        return np.concatenate([[self.loss], self.confusion.reshape(-1)]).astype(np.float64)

    @classmethod
    def from_vector(cls, vector: NDArray[np.float64], classes: int) -> Self:
        """The tally that ``to_vector`` wrote.

        Raises:
            MessageError: wrong length, not finite, or counts that are no counts.
        """
        if vector.dtype != np.float64 or vector.shape != (1 + classes**2,):
            raise MessageError("a metrics vector has the wrong length or type")
        if not np.isfinite(vector).all() or (np.abs(vector) > LARGEST).any():
            raise MessageError("a metrics vector is not finite or absurdly large")
        counts = vector[1:].astype(np.int64)
        if (counts < 0).any() or (counts != vector[1:]).any():
            raise MessageError("a metrics vector holds counts that are not whole numbers")
        return cls(float(vector[0]), counts.reshape(classes, classes))
