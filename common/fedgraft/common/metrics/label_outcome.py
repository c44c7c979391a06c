"""Was federating worth it for one site: paired tests and intervals that say what they assume.

Both models answer the same test examples, so only the examples on which exactly one of them is
right can tell them apart. That is the exact McNemar test: the discordant examples against a fair
coin (McNemar 1947, "Note on the sampling error of the difference between correlated proportions
or percentages", Psychometrika 12). The interval of the difference is method 10 of Newcombe 1998
("Improved confidence intervals for the difference between binomial proportions based on paired
data", Statistics in Medicine 17): Wilson intervals of both shares, squared and added with a
correction for their correlation. It keeps its level in small test sets and never leaves -1..1.
Macro F1 is no share of examples: its difference has a paired bootstrap interval, in which both
models answer the same redrawn examples (Efron and Tibshirani 1993, "An Introduction to the
Bootstrap", chapter 13).

All of it treats test examples as independent draws; many images of one patient are fewer
examples than they seem, and then every interval here is too narrow.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "Outcome",
    "Rival",
    "Verdict",
    "as_points",
    "macro_f1_difference",
    "macro_f1_interval",
    "verdict",
    "wilson_interval",
]

Outcome = Literal["helped", "hurt", "unclear", "unknown"]
Rival = Literal["local_only", "zero_shot"]

LEVEL = 0.05
DRAWN_AT_ONCE = 1 << 20  # counts, 8 bytes each
_Z = 1.959963984540054  # the normal quantile that leaves 2.5 % on either side


@dataclass(frozen=True)
class Verdict:
    """What the comparison says; differences are federated minus the other, as fractions -1..1.

    ``outcome`` is "helped" or "hurt" only where the exact test is below 5 % and the interval
    excludes 0, "unclear" where the examples cannot tell, "unknown" where there are none.
    """

    outcome: Outcome
    sentence: str
    difference: float
    interval: tuple[float, float]
    p_value: float


def verdict(
    federated_correct: npt.NDArray[np.bool_],
    local_correct: npt.NDArray[np.bool_],
    *,
    name: str,
    rival: Rival = "local_only",
) -> Verdict:
    """Compare two models on the same test examples of the site ``name``.

    Args:
        federated_correct: bool [n], where the federated model is right.
        local_correct: bool [n], where the other model is right, in the same order.
        name: the site as the sentence calls it; not escaped.
        rival: what the other model is: the site's own, or the backbone untouched.

    Raises:
        ValueError: the two are not boolean vectors of one length.
    """
    federated, local = np.asarray(federated_correct), np.asarray(local_correct)
    if federated.ndim != 1 or federated.shape != local.shape:
        raise ValueError(f"two vectors of one length, not {federated.shape} and {local.shape}")
    if federated.dtype != np.bool_ or local.dtype != np.bool_:
        raise ValueError(f"boolean vectors, not {federated.dtype} and {local.dtype}")
    if federated.size == 0:
        sentence = f"Whether federating helped {name} is not known: it has no test examples."
        return Verdict("unknown", sentence, 0.0, (-1.0, 1.0), 1.0)

    both = int(np.sum(federated & local))
    only_federated = int(np.sum(federated & ~local))
    only_local = int(np.sum(~federated & local))
    difference = (only_federated - only_local) / federated.size
    interval = _paired_interval(both, only_federated, only_local, federated.size)
    p_value = _mcnemar(only_federated, only_local)
    outcome = _outcome(interval, p_value)
    tell = _sentence if rival == "local_only" else _sentence_of_backbone
    sentence = tell(
        outcome,
        name=name,
        shares=(float(federated.mean()), float(local.mean())),
        difference=difference,
        interval=interval,
        p_value=p_value,
        examples=federated.size,
    )
    return Verdict(outcome, sentence, difference, interval, p_value)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of ``correct / total``, as fractions (Wilson 1927, JASA 22).

    With no examples nothing is known: (0, 1).

    Raises:
        ValueError: unless ``0 <= correct <= total``.
    """
    if not 0 <= correct <= total:
        raise ValueError(f"0 <= correct <= total, not {correct} of {total}")
    if total == 0:
        return 0.0, 1.0
    share, z2 = correct / total, _Z * _Z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    # At the ends the formula is exact on paper and off by an ulp in floating point.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


def macro_f1_interval(
    confusion: npt.NDArray[np.integer], generator: np.random.Generator, draws: int = 500
) -> tuple[float, float]:
    """The 95 % percentile interval of macro F1, by multinomial bootstrap of the confusion matrix.

    Every draw spreads as many examples as there were over the cells, in proportion to their
    counts, which is the same as redrawing the test examples with replacement. Macro F1 is the mean
    over the classes that occur among the true labels, in each draw those of that draw. The
    interval cannot know of mistakes that did not occur: a perfect matrix gives (1, 1).

    Args:
        confusion: int [c, c], rows the true label, columns the predicted one.
        generator: where the draws come from.
        draws: resamples; 500 put the ends within about a tenth of the interval's width.

    Returns:
        Low and high as fractions; (0, 1) if the matrix is empty.

    Raises:
        ValueError: not a square matrix of counts, or no draws.
    """
    counts = np.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"a square confusion matrix, not shape {counts.shape}")
    if not np.issubdtype(counts.dtype, np.integer) or (counts.size and counts.min() < 0):
        raise ValueError("a confusion matrix holds counts: integers, none below 0")
    if draws < 1:
        raise ValueError(f"at least one draw, not {draws}")
    total = int(counts.sum())
    if total == 0:
        return 0.0, 1.0
    # Cells at zero stay at zero: with many classes nearly all of the matrix need not be drawn.
    true, predicted = np.nonzero(counts)
    shares = counts[true, predicted] / total
    # In slices, which are the same draws: a large matrix must not be held 500 times over.
    most = max(1, DRAWN_AT_ONCE // len(shares))
    scores = [
        _macro_f1(generator.multinomial(total, shares, size=size), true, predicted)
        for size in (min(most, draws - start) for start in range(0, draws, most))
    ]
    low, high = np.quantile(np.concatenate(scores), [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def macro_f1_difference(
    true: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    second: npt.NDArray[np.int64],
    *,
    generator: np.random.Generator,
    draws: int = 500,
) -> tuple[float, tuple[float, float]]:
    """Macro F1 of ``first`` minus that of ``second``, and its 95 % paired bootstrap interval.

    Args:
        true: int64 [n], the labels.
        first: int64 [n], what one model predicts for the same examples.
        second: int64 [n], what the other does.
        generator: where the draws come from.
        draws: resamples, as for ``macro_f1_interval``.

    Returns:
        The difference and the ends, -1..1; (0, (-1, 1)) without examples.

    Raises:
        ValueError: the three are not of one length, or no draws.
    """
    if not true.shape == first.shape == second.shape or true.ndim != 1:
        raise ValueError(f"one length, not {true.shape}, {first.shape} and {second.shape}")
    if draws < 1:
        raise ValueError(f"at least one draw, not {draws}")
    if not len(true):
        return 0.0, (-1.0, 1.0)
    # An example is known by its label and both answers: redrawing examples is redrawing cells.
    cells, counts = np.unique(np.stack([true, first, second]), axis=1, return_counts=True)
    labels, ours, others = cells

    def gaps(samples: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return _macro_f1(samples, labels, ours) - _macro_f1(samples, labels, others)

    most = max(1, DRAWN_AT_ONCE // len(counts))
    drawn = [
        gaps(generator.multinomial(len(true), counts / len(true), size=size))
        for size in (min(most, draws - start) for start in range(0, draws, most))
    ]
    low, high = np.quantile(np.concatenate(drawn), [LEVEL / 2, 1 - LEVEL / 2])
    return float(gaps(counts[np.newaxis])[0]), (float(low), float(high))


def _macro_f1(
    samples: npt.NDArray[np.int64], true: npt.NDArray[np.intp], predicted: npt.NDArray[np.intp]
) -> npt.NDArray[np.float64]:
    """Macro F1 [draws] of counts [draws, cells] whose cell k is (true[k], predicted[k])."""
    labels = np.unique(true)  # a class that is never true does not count
    row_of = {label: row for row, label in enumerate(labels.tolist())}
    hits, support, guesses = np.zeros((3, len(labels), len(samples)), np.int64)
    # Cell by cell: there are few of them in a site's matrix, and no copy of all in a large one.
    cells = np.ascontiguousarray(samples.T)
    for counts, row, column in zip(cells, true.tolist(), predicted.tolist(), strict=True):
        support[row_of[row]] += counts
        if row == column:
            hits[row_of[row]] += counts
        if column in row_of:
            guesses[row_of[column]] += counts
    # F1 = 2 hits / (support + guesses), and support > 0 wherever it counts.
    f1 = np.zeros((len(samples), int(labels[-1]) + 1))
    f1[:, labels] = (2 * hits / np.maximum(support + guesses, 1)).T
    occurs = np.zeros(f1.shape, np.bool_)
    occurs[:, labels] = (support > 0).T
    scores: npt.NDArray[np.float64] = f1.sum(axis=1, where=occurs) / (support > 0).sum(axis=0)
    return scores


@cache  # thousands of sites with small test sets share few pairs of counts
def _mcnemar(only_federated: int, only_local: int) -> float:
    """Two-sided exact p-value; with no discordant example there is nothing against equality."""
    discordant = only_federated + only_local
    if discordant == 0:
        return 1.0
    from scipy.stats import binomtest  # at the end of a run, not in the memory of every worker

    return float(binomtest(only_federated, discordant, 0.5).pvalue)


def _paired_interval(
    both: int, only_federated: int, only_local: int, total: int
) -> tuple[float, float]:
    """Newcombe's method 10 for federated minus local, 95 %."""
    neither = total - both - only_federated - only_local
    federated, local = both + only_federated, both + only_local
    difference = (only_federated - only_local) / total
    (low_f, high_f), (low_l, high_l) = (
        wilson_interval(federated, total),
        wilson_interval(local, total),
    )
    below_f, above_f = federated / total - low_f, high_f - federated / total
    below_l, above_l = local / total - low_l, high_l - local / total
    phi = _correlation(both * neither - only_federated * only_local, federated, local, total)
    down = below_f**2 - 2 * phi * below_f * above_l + above_l**2
    up = above_f**2 - 2 * phi * above_f * below_l + below_l**2
    # Both are sums of squares on paper (|phi| <= 1); rounding may put them just below 0.
    return (
        max(-1.0, difference - math.sqrt(max(0.0, down))),
        min(1.0, difference + math.sqrt(max(0.0, up))),
    )


def _correlation(cross: int, federated: int, local: int, total: int) -> float:
    """Phi of the 2x2 table with Newcombe's continuity correction (only where positive)."""
    margins = federated * (total - federated) * local * (total - local)
    if margins == 0:
        return 0.0
    corrected = max(cross - total / 2, 0.0) if cross > 0 else float(cross)
    return corrected / math.sqrt(margins)


def _outcome(interval: tuple[float, float], p_value: float) -> Outcome:
    """Both must agree: test and interval differ at the margin, and the sentence shows both."""
    if p_value < LEVEL and interval[0] > 0:
        return "helped"
    if p_value < LEVEL and interval[1] < 0:
        return "hurt"
    return "unclear"


def _sentence(
    outcome: Outcome,
    *,
    name: str,
    shares: tuple[float, float],
    difference: float,
    interval: tuple[float, float],
    p_value: float,
    examples: int,
) -> str:
    federated, local = (f"{100 * share:.1f} %" for share in shares)
    gap = f"difference {as_points(difference)} points"
    span = f"95 % interval {as_points(interval[0])} to {as_points(interval[1])}"
    if outcome in ("helped", "hurt"):
        return (
            f"Federating {outcome} {name}: {federated} right instead of {local} on its own "
            f"({gap}, {span})."
        )
    count = "1 test example" if examples == 1 else f"{examples:,} test examples"
    return (
        f"Unclear for {name}: {federated} right federated, {local} on its own, and {count} "
        f"cannot tell which is better ({gap}, {span}, p = {p_value:.2f})."
    )


def _sentence_of_backbone(
    outcome: Outcome,
    *,
    name: str,
    shares: tuple[float, float],
    difference: float,
    interval: tuple[float, float],
    p_value: float,
    examples: int,
) -> str:
    """The verdict on training at all, beside the one on training together."""
    federated, untouched = (f"{100 * share:.1f} %" for share in shares)
    gap = f"difference {as_points(difference)} points"
    span = f"95 % interval {as_points(interval[0])} to {as_points(interval[1])}"
    if outcome == "unclear":
        count = "1 test example" if examples == 1 else f"{examples:,} test examples"
        return (
            f"Against the backbone untouched (zero-shot, {untouched}) {count} cannot tell "
            f"({gap}, {span}, p = {p_value:.2f})."
        )
    better, moral = "better", ""
    if outcome == "hurt":
        better, moral = "worse", " This is negative transfer."
    return (
        f"At {name} the federated model is {better} than the backbone untouched: {federated} right "
        f"instead of {untouched} zero-shot ({gap}, {span}).{moral}"
    )


def as_points(fraction: float) -> str:
    """Signed percentage points with one decimal; what rounds to zero has no sign."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text
