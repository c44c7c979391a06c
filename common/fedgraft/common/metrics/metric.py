"""A figure of a model, as tables and pages show it."""

import math
from dataclasses import dataclass

__all__ = ["Metric"]


@dataclass(frozen=True)
class Metric:
    """A figure of a model: its ``key`` in a summary, its ``name`` in a table.

    ``percent``: it is a share, shown in percent. ``hub`` is what the Hugging Face hub calls it,
    where that differs from the key. ``higher``: a larger value is a better model.
    ``short`` is the name where there is little room. ``digits`` that count
    are shown where that is not 0: of a figure whose unit is not known.
    """

    key: str
    name: str
    percent: bool = True
    hub: str = ""
    higher: bool = True
    short: str = ""
    digits: int = 0

    @property
    def title(self) -> str:
        """The name as a sentence begins with it."""
        return self.name[:1].upper() + self.name[1:]

    def text(self, value: float | None, missing: str = "-", unit: str = " %") -> str:
        """``value`` with one decimal of a percent, or in a few digits."""
        if value is None or not math.isfinite(value):
            return missing
        if self.percent:
            return f"{100 * value:.1f}{unit}"
        if self.digits:
            return f"{value:.{self.digits}g}"
        if abs(value) < 1000:
            return f"{value:.2f}"
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.2g}"
