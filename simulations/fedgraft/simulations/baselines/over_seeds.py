"""What several seeds of one job say together: the mean, and how far chance may have moved it.

A seed changes everything random: the split over sites, the head, the factors, the batches. The
interval is Student's: right for values that are normal over seeds, and with two or three seeds as
wide as so few deserve.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t

__all__ = ["Spread", "spread"]


@dataclass(frozen=True)
class Spread:
    """A mean and half the width of its 95 % t-interval; ``half`` is None for one value."""

    mean: float
    half: float | None

    def text(self, *, scale: float = 1.0, digits: int = 1) -> str:
        """``88.7 ± 2.7``, both times ``scale`` and with ``digits`` decimals."""
        mean = f"{scale * self.mean:.{digits}f}"
        return mean if self.half is None else f"{mean} ± {scale * self.half:.{digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and interval of one value a seed.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("no values")
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Spread(mean, None)
    error = statistics.stdev(values) / len(values) ** 0.5
    return Spread(mean, float(t.ppf(0.975, len(values) - 1)) * error)
