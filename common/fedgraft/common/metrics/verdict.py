"""What is said of two models on one site's test examples: the shape of a verdict, its words."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Outcome", "Rival", "Verdict", "as_points"]

Outcome = Literal["helped", "hurt", "unclear", "unknown"]
Rival = Literal["local_only", "zero_shot"]


@dataclass(frozen=True)
class Verdict:
    """What a comparison says; differences are federated minus the other.

    ``outcome`` is "helped" or "hurt" only where the test is below 5 % and the interval excludes 0,
    "unclear" where the examples cannot tell, "unknown" where there are none. The unit of
    ``difference`` and ``interval`` is that of the task: of labels a fraction -1..1, of tokens nats
    a token, of patches the mean absolute error of a pixel. ``interval`` is None where there are too
    few examples for one.
    """

    outcome: Outcome
    sentence: str
    difference: float
    interval: tuple[float, float] | None
    p_value: float


def as_points(fraction: float) -> str:
    """Signed percentage points with one decimal; what rounds to zero has no sign."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text
