"""The contract of a rule, and the running sum that every rule which needs only sums shares."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.layout import Layout, Vector

__all__ = ["Collector", "MeanRule", "Rule", "RunningMean", "Tensors"]

Tensors = dict[str, NDArray[Any]]


class Rule(Protocol):
    """How the updates of one round become one.

    ``needs`` is ``"sum"`` if the weighted sum of the updates is enough, so that masked sums work,
    or ``"individual"`` if the rule must see each site's own.
    """

    @property
    def needs(self) -> Literal["sum", "individual"]:
        """What the rule must see."""
        ...

    def exchanges(self, layout: Layout) -> tuple[str, ...]:
        """Names of the tensors in ``layout`` that sites train and send."""
        ...

    def collect(self, size: int) -> "Collector":
        """Something that takes the updates of one round, float32 [size] each."""
        ...

    def merge(self, combined: NDArray[np.float64]) -> NDArray[np.float64]:
        """The step of the global adapter, from what ``collect`` combined, both [d].

        For a rule that needs only sums that is the weighted mean, whoever computed it.
        """
        ...


class Collector(Protocol):
    """Takes updates one by one and combines them."""

    @property
    def count(self) -> int:
        """Updates so far."""
        ...

    def add(self, update: Vector, weight: float) -> None:
        """Take ``update``, float32 [size], with a positive ``weight``."""
        ...

    def combined(self) -> NDArray[np.float64]:
        """All of them combined, float64 [size]; ZeroDivisionError if there are none."""
        ...

    def kept(self) -> Tensors:
        """All that it holds, so that a round can go on after a crash."""
        ...

    def restore(self, kept: Tensors) -> None:
        """Hold what ``kept`` gave, instead of nothing."""
        ...


class RunningMean:
    """Weighted mean of updates that arrive one by one; one float64 vector, never the updates."""

    def __init__(self, size: int) -> None:
        self._sum = np.zeros(size, np.float64)
        self.weight = 0.0
        self.count = 0

    def add(self, update: Vector, weight: float) -> None:
        """Add ``update``, float32 [size], with a positive ``weight``."""
        self._sum += np.multiply(update, weight, dtype=np.float64)
        self.weight += weight
        self.count += 1

    def kept(self) -> Tensors:
        """The sum [size], the weight and the count, float64."""
        return {"sum": self._sum, "facts": np.array([self.weight, self.count], np.float64)}

    def restore(self, kept: Tensors) -> None:
        """Go on from what ``kept`` gave."""
        self._sum, (self.weight, count) = kept["sum"].copy(), kept["facts"].tolist()
        self.count = int(count)

    def combined(self) -> NDArray[np.float64]:
        """The weighted mean so far, float64 [size].

        Raises:
            ZeroDivisionError: nothing was added.
        """
        if not self.count:
            raise ZeroDivisionError("the mean of no updates")
        return self._sum / self.weight


@dataclass(frozen=True)
class MeanRule:
    """What rules have in common whose step is the weighted mean of what travels."""

    needs: Literal["sum", "individual"] = "sum"

    def collect(self, size: int) -> RunningMean:
        """The weighted mean."""
        return RunningMean(size)

    def merge(self, combined: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean itself."""
        return combined
