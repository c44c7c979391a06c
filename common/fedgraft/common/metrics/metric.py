"""A metric of a model, as tables and pages show it."""

import math
from dataclasses import dataclass

__all__ = ["Metric"]


@dataclass(frozen=True)
class Metric:
    """A metric of a model: its ``key`` in a summary, its ``name`` in a table.

    ``percent``: the metric is a share, shown in percent. ``hub`` is the Hugging Face hub's name, if
    it differs from the key. ``higher``: a larger value means a better model. ``short`` is the name
    for narrow places. ``digits``, if not 0, is the number of significant digits: for a metric whose
    unit is not known. ``right``: the metric is the share of examples that the model is right for.
    ``parts``: the metric is a mean over such parts of an example, which each backbone cuts in its
    own way; so figures of two backbones do not compare.
    """

    key: str
    name: str
    percent: bool = True
    hub: str = ""
    higher: bool = True
    short: str = ""
    digits: int = 0
    right: bool = False
    parts: str = ""

    @property
    def title(self) -> str:
        """Return the name with a capital letter, for the start of a sentence."""
        return self.name[:1].upper() + self.name[1:]

    def text(self, value: float | None, missing: str = "-", unit: str = " %") -> str:
        """Return ``value`` in percent with one decimal, or in a few digits."""
        if value is None or not math.isfinite(value):
            return missing
        if self.percent:
            return f"{100 * value:.1f}{unit}"
        if self.digits:
            return f"{value:.{self.digits}g}"
        if abs(value) < 1000:
            return f"{value:.2f}"
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.2g}"
