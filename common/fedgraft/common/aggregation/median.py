"""The coordinate-wise median: a few sites that send nonsense cannot move it far.

Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (ICML).

    x <- x + median_i (x_i - x),   coordinate by coordinate

Every site counts alike. It must see each update, so it keeps one vector a site, and it cannot work
under secure aggregation.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.aggregation.base import PLAIN_MEAN, Tensors, WholeAdapter
from fedgraft.common.layout import Vector
from fedgraft.common.section import Refuses


@dataclass(frozen=True)
class Median(WholeAdapter):
    """Every tensor of the adapter trains and travels."""

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
        """All updates, for their median."""
        return Updates(size)

    def merge(self, combined: NDArray[np.float64]) -> NDArray[np.float64]:
        """The median itself."""
        return combined


class Updates:
    """The updates of one round, kept: float32 [count, size]."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: list[Vector] = []

    @property
    def count(self) -> int:
        """Updates so far."""
        return len(self._kept)

    def add(self, update: Vector, weight: float) -> None:
        """Keep ``update``, float32 [size]; the weight does not count."""
        self._kept.append(update)

    def kept(self) -> Tensors:
        """The updates, float32 [count, size]."""
        return {"updates": np.array(self._kept, np.float32).reshape(-1, self._size)}

    def restore(self, kept: Tensors) -> None:
        """Go on from what ``kept`` gave."""
        self._kept = list(kept["updates"])

    def combined(self) -> NDArray[np.float64]:
        """The median of every coordinate, float64 [size].

        Raises:
            ZeroDivisionError: there is no update.
        """
        if not self._kept:
            raise ZeroDivisionError("the median of no updates")
        result = np.empty(self._size, np.float64)
        for low in range(0, self._size, PIECE):  # a copy of a piece, not of everything
            piece = slice(low, low + PIECE)
            result[piece] = np.median([update[piece] for update in self._kept], axis=0)
        return result


PIECE = 1 << 16
