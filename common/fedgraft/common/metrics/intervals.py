"""Confidence intervals and tests for shares, macro F1 and differences of two models.

Both models predict the same test examples. So only the examples on which exactly one model is
correct (discordant examples) show a difference. The exact McNemar test compares the discordant
examples with a fair coin (McNemar 1947, "Note on the sampling error of the difference between
correlated proportions or percentages", Psychometrika 12). The interval of the difference is method
10 of Newcombe 1998 ("Improved confidence intervals for the difference between binomial proportions
based on paired data", Statistics in Medicine 17): Wilson intervals of both shares, squared and
added, with a correction for their correlation. This interval keeps its level in small test sets and
never leaves -1..1. Macro F1 is not a share of examples: its difference has a paired bootstrap
interval, in which both models predict the same resampled examples (Efron and Tibshirani 1993, "An
Introduction to the Bootstrap", chapter 13).

Sums over the parts of an example (the tokens of a text) are resampled by clusters: one text
is one cluster, however many blocks it is cut into. Source: Cameron, Gelbach and Miller 2008,
"Bootstrap-Based Improvements for Inference with Clustered Errors", Review of Economics and
Statistics 90. The paired permutation test swaps the losses of the two models in randomly chosen
clusters (Good 2005, "Permutation, Parametric, and Bootstrap Tests of Hypotheses").
"""

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "LEVEL",
    "macro_f1_difference",
    "macro_f1_interval",
    "mcnemar",
    "paired_interval",
    "percentile_interval",
    "permutation_test",
    "redrawn_sums",
    "wilson_interval",
]

LEVEL = 0.05
DRAWN_AT_ONCE = 1 << 20  # counts, 8 bytes each
_Z = 1.959963984540054  # the normal quantile with 2.5 % on either side
DRAWS = 1000
AT_ONCE = 1 << 22  # resampled clusters in memory

Clusters = npt.NDArray[Any]


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % score interval of ``correct / total``, as fractions (Wilson 1927, JASA 22).

    Without examples the share is unknown, and the interval is (0, 1).

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
    # At the ends the formula is exact in theory; floating point is off by one ulp.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


def macro_f1_interval(
    confusion: npt.NDArray[np.integer], generator: np.random.Generator, draws: int = 500
) -> tuple[float, float]:
    """Return the 95 % percentile interval of macro F1: a multinomial bootstrap of the matrix.

    Each resample distributes the same number of examples over the cells of the confusion matrix, in
    proportion to their counts. This is equal to resampling the test examples with replacement.
    Macro F1 is the mean over the classes that are true or predicted in that resample. The
    interval does not cover mistakes that did not occur: a perfect matrix gives (1, 1).

    Args:
        confusion: int [c, c]; a row is a true label, a column is a predicted label.
        generator: the source of the random draws.
        draws: resamples; with 500 the ends are within about a tenth of the interval's width.

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
    # Zero cells stay zero: with many classes nearly all of the matrix is not drawn.
    true, predicted = np.nonzero(counts)
    shares = counts[true, predicted] / total
    # Slices give the same draws and avoid 500 copies of a large matrix.
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
    """Return macro F1 of ``first`` minus that of ``second``, with a 95 % paired bootstrap interval.

    Args:
        true: int64 [n], the labels.
        first: int64 [n], the predictions of one model.
        second: int64 [n], the predictions of the other model for the same examples.
        generator: the source of the random draws.
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
    # The label and both predictions define an example: resampling examples is resampling cells.
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
    """Return macro F1 [draws] of counts [draws, cells]; cell k is (true[k], predicted[k])."""
    labels = np.unique(np.concatenate([true, predicted]))  # classes of nobody do not count
    row_of = {label: row for row, label in enumerate(labels.tolist())}
    hits, support, guesses = np.zeros((3, len(labels), len(samples)), np.int64)
    # Cell by cell: a site's matrix has few cells, and a large matrix is not copied.
    cells = np.ascontiguousarray(samples.T)
    for counts, row, column in zip(cells, true.tolist(), predicted.tolist(), strict=True):
        support[row_of[row]] += counts
        if row == column:
            hits[row_of[row]] += counts
        guesses[row_of[column]] += counts
    # F1 = 2 hits / (support + guesses); a class of the resample has one of the two.
    f1 = np.zeros((len(samples), int(labels[-1]) + 1))
    f1[:, labels] = (2 * hits / np.maximum(support + guesses, 1)).T
    scores: npt.NDArray[np.float64] = f1.sum(axis=1) / (support + guesses > 0).sum(axis=0)
    return scores


@cache  # thousands of sites with small test sets have few different pairs
def mcnemar(only_federated: int, only_local: int) -> float:
    """Return the two-sided exact p-value; it is 1 without discordant examples."""
    discordant = only_federated + only_local
    if discordant == 0:
        return 1.0
    from scipy.stats import binomtest  # only at the end of a run: not in every worker's memory

    return float(binomtest(only_federated, discordant, 0.5).pvalue)


def paired_interval(
    both: int, only_federated: int, only_local: int, total: int
) -> tuple[float, float]:
    """Return Newcombe's method 10 for federated minus local, 95 %."""
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
    # Both are sums of squares in theory (|phi| <= 1); rounding can give values just below 0.
    return (
        max(-1.0, difference - math.sqrt(max(0.0, down))),
        min(1.0, difference + math.sqrt(max(0.0, up))),
    )


def _correlation(cross: int, federated: int, local: int, total: int) -> float:
    """Return phi of the 2x2 table with Newcombe's continuity correction (only if positive)."""
    margins = federated * (total - federated) * local * (total - local)
    if margins == 0:
        return 0.0
    corrected = max(cross - total / 2, 0.0) if cross > 0 else float(cross)
    return corrected / math.sqrt(margins)


def redrawn_sums(sums: Clusters, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return sums [k, DRAWS] over resampled columns of ``sums`` [k, clusters]."""
    clusters = sums.shape[1]
    shares = np.full(clusters, 1 / clusters)
    most = max(1, AT_ONCE // clusters)
    parts = [
        sums @ generator.multinomial(clusters, shares, min(most, DRAWS - at)).T
        for at in range(0, DRAWS, most)
    ]
    return np.concatenate(parts, axis=1)


def percentile_interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % percentile interval of resampled ``values``."""
    low, high = np.quantile(values, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def permutation_test(gaps: Clusters, generator: np.random.Generator) -> float:
    """Return the two-sided p-value: how often a random swap gives a difference at least as large.

    The observed order counts as one of the draws, so that the p-value is never 0 (Phipson and Smyth
    2010, "Permutation P-values Should Never Be Zero").
    """
    least = abs(gaps.sum()) * (1 - 1e-9)  # the order of a sum changes the last bits
    most, found = max(1, AT_ONCE // len(gaps)), 0
    for at in range(0, DRAWS, most):
        signs = generator.choice((-1.0, 1.0), (min(most, DRAWS - at), len(gaps)))
        found += int(np.count_nonzero(np.abs(signs @ gaps) >= least))
    return (found + 1) / (DRAWS + 1)
