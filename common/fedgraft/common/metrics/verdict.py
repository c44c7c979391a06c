"""The verdict on two models on one site's test examples: its fields and its words."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Outcome", "Rival", "Verdict", "as_points"]

Outcome = Literal["helped", "hurt", "unclear", "unknown"]
Rival = Literal["local_only", "zero_shot"]


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison; differences are federated minus the other model.

    ``outcome`` is "helped" or "hurt" only if the test is below 5 % and the interval excludes 0. It
    is "unclear" if the examples do not show a difference, and "unknown" if there are no examples.
    The unit of ``difference`` and ``interval`` is the task's unit: for labels a fraction -1..1, for
    tokens nats per token, for patches the mean absolute error of a pixel. ``interval`` is None if
    there are too few examples for an interval.
    """

    outcome: Outcome
    sentence: str
    difference: float
    interval: tuple[float, float] | None
    p_value: float


def as_points(fraction: float) -> str:
    """Return signed percentage points with one decimal; a value that rounds to zero has no sign."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text
