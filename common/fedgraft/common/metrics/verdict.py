"""The verdict on two models on one site's test examples: its fields and its words."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fedgraft.common.metrics.intervals import LEVEL

__all__ = [
    "COVERS",
    "Outcome",
    "Rival",
    "Verdict",
    "as_points",
    "judge",
    "not_known",
    "numbered",
    "tell",
]

Outcome = Literal["helped", "hurt", "unclear", "unknown"]
Rival = Literal["local_only", "zero_shot"]

NEGATIVE = " This is negative transfer."
COVERS = (
    "A verdict compares two trained models. Its test and its interval say how far the choice of "
    "test examples could mislead. They do not cover chance in training: the same training with "
    "another seed is another model, and its verdict can differ. Several seeds show how much."
)


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison; differences are federated minus the other model.

    ``outcome`` is "helped" or "hurt" only if the test is below 5 % and the interval excludes 0. It
    is "unclear" if the examples do not show a difference, and "unknown" if there are no examples.
    The unit of ``difference`` and ``interval`` is the task's unit: for labels and for entity F1 of
    tags a fraction -1..1, for tokens nats per token, for patches the mean absolute error of a
    pixel, for numbers the absolute error in the target's unit. ``interval`` is None if there are
    too few examples for an interval.
    """

    outcome: Outcome
    sentence: str
    difference: float
    interval: tuple[float, float] | None
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as plain JSON values."""
        return {**asdict(self), "interval": self.interval and list(self.interval)}


def judge(interval: tuple[float, float] | None, p_value: float, *, higher: bool) -> Outcome:
    """Return the outcome; the test and the interval must agree.

    The two can differ close to the limit, and the sentence shows both. ``higher``: a difference
    above 0 means that the federated model is better.
    """
    if interval is None or p_value >= LEVEL or interval[0] <= 0 <= interval[1]:
        return "unclear"
    return "helped" if (interval[0] > 0) == higher else "hurt"


def not_known(name: str, what: str) -> str:
    """Return the sentence for the site ``name`` without test examples; ``what`` is their word."""
    return f"Whether federating helped {name} is not known: it has no test {what}."


def tell(
    outcome: Outcome,
    *,
    name: str,
    rival: Rival,
    shown: tuple[str, str],
    facts: str,
    p_value: float,
    witness: str = "that",
) -> str:
    """Return the sentence of an outcome for the site ``name``, which is not escaped.

    Args:
        outcome: not "unknown", which has a sentence of its own.
        name: the site.
        rival: the other model: the site's own model, or the backbone without training.
        shown: the results of the federated and of the other model, as text.
        facts: the difference, its interval and the number of examples, as text.
        p_value: of the test; it is shown if the outcome is "unclear".
        witness: what cannot tell which model is better, if the outcome is "unclear".
    """
    ours, theirs = shown
    alone = rival == "local_only"
    if outcome == "unclear":
        beside = "on its own" if alone else "for the backbone untouched"
        return (
            f"Unclear for {name}: {ours} federated, {theirs} {beside}, and {witness} cannot tell "
            f"which is better ({facts}, p = {p_value:.2f})."
        )
    # The models are compared, not the ways of training: ``COVERS`` says so beside the sentences.
    better = "better" if outcome == "helped" else "worse"
    than = "the site's own" if alone else "the backbone untouched"
    moral = NEGATIVE if outcome == "hurt" and not alone else ""
    return (
        f"At {name} the federated model is {better} than {than}: {ours} instead of {theirs} "
        f"({facts}).{moral}"
    )


def numbered(count: int, one: str, many: str) -> str:
    """Return a number of examples in words: ``one``, or the number and ``many``."""
    return one if count == 1 else f"{count:,} {many}"


def as_points(fraction: float) -> str:
    """Return signed percentage points with one decimal; a value that rounds to zero has no sign."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text
