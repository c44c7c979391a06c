"""The mean over several seeds of one job, and its interval, which shows the effect of chance.

A seed changes everything random: the split over sites, the head, the factors, the batches. The
interval is Student's t-interval. It is correct for values that are normal over seeds. With two or
three seeds it is wide, because so few values say little.
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
        """Return text such as ``88.7 ± 2.7``, times ``scale`` and with ``digits`` decimals."""
        mean = f"{scale * self.mean:.{digits}f}"
        return mean if self.half is None else f"{mean} ± {scale * self.half:.{digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Return mean and interval of ``values``, one value per seed.

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
