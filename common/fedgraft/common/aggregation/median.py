"""The coordinate-wise median: a few sites with wrong updates cannot move it far.

Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (ICML).

    x <- x + median_i (x_i - x),   coordinate by coordinate

Every site has the same weight. The rule must see each update: it stores one vector for each site,
and it cannot work under secure aggregation.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.aggregation.base import PLAIN_MEAN, Tensors, WholeAdapter
from fedgraft.common.layout import Vector
from fedgraft.common.section import Refuses

__all__ = ["Median"]


@dataclass(frozen=True)
class Median(WholeAdapter):
    """The median rule: sites train and send every tensor of the adapter."""

    needs: Literal["sum", "individual"] = "individual"
    refuses: ClassVar[Refuses] = {
        "consolidation": PLAIN_MEAN,
        "domain": PLAIN_MEAN,
        "secure_aggregation": (
            'rule "{rule}" must see each site\'s own update, and secure aggregation shows the '
            "coordinator only their sum",
            "aggregation.rule = one of {rules_of_sums}, "
            "or privacy.secure_aggregation.enabled = false",
        ),
    }

    def collect(self, size: int) -> "Updates":
        """Return a collector that stores all updates, because the median needs all of them."""
        return Updates(size)

    def merge(self, combined: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the median itself."""
        return combined


class Updates:
    """The stored updates of one round: float32 [count, size]."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: list[Vector] = []

    @property
    def count(self) -> int:
        """Return the number of updates so far."""
        return len(self._kept)

    def add(self, update: Vector, weight: float) -> None:
        """Store ``update``, float32 [size]; the weight is ignored."""
        self._kept.append(update)

    def kept(self) -> Tensors:
        """Return the updates, float32 [count, size]."""
        return {"updates": np.array(self._kept, np.float32).reshape(-1, self._size)}

    def restore(self, kept: Tensors) -> None:
        """Continue from ``kept``, a state that the method ``kept`` returned."""
        self._kept = list(kept["updates"])

    def combined(self) -> NDArray[np.float64]:
        """Return the median of every coordinate, float64 [size].

        Raises:
            ZeroDivisionError: there is no update.
        """
        if not self._kept:
            raise ZeroDivisionError("the median of no updates")
        result = np.empty(self._size, np.float64)
        for low in range(0, self._size, PIECE):  # np.median copies: only one piece at a time
            piece = slice(low, low + PIECE)
            result[piece] = np.median([update[piece] for update in self._kept], axis=0)
        return result


PIECE = 1 << 16
