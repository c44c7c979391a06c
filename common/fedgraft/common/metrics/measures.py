"""Additional counts beside the confusion matrix: whole numbers that are summed over sites.

Ranking and calibration need scores, but the score of one example must not leave a site. A site
sends the number of scores in each of a fixed number of bins, and the number of correct examples of
each group. The length of this vector depends only on the job, so the vector can go through a secure
sum.

    scores[c, s, b]   examples of class c (s = 0) or of another of its head (s = 1) whose log-odds
                      of class c are in bin b; log-odds, because ranks need resolution near 0 and 1
    sure[s, b]        predictions that were correct (s = 0) or wrong (s = 1), by the probability of
                      the predicted class, in bins of equal width over 0..1
    groups[g, s]      examples of group g with a correct (s = 0) or a wrong (s = 1) prediction

If a job has several heads, only the classes of an example's own head are possible answers. An
example says nothing about the ranking of other classes, so it is not counted there.

AUROC is exact except for pairs whose scores are in one bin. Each such pair counts 1/2, and the true
value is between 0 and 1. So the error of AUROC is at most half the share of such pairs
(``auroc_error``). The calibration error (Naeini et al. 2015, "Obtaining Well Calibrated
Probabilities Using Bayesian Binning", AAAI) uses the middle of a bin for the probabilities in the
bin. So its error is at most half a bin, ``1 / (2 bins)``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.examples import Examples, Indices
from fedgraft.common.metrics.evaluation import TALLY_LIMIT
from fedgraft.common.metrics.label_evaluation import LabelEvaluation
from fedgraft.common.metrics.tally import Counts, Tally

__all__ = ["CALIBRATION_BINS", "LabelMeasures"]

CALIBRATION_BINS = 10  # of the calibration error; ``bins`` is a multiple, so that edges agree
LOG_ODDS = 16.0  # all log-odds beyond it (1 in 9 million) are in the last bin


@dataclass(frozen=True)
class LabelMeasures:
    """The counts of a job with ``classes`` labels: scores in ``bins`` (0: none), and ``groups``.

    A group with fewer than ``fewest`` examples is not shown. ``heads`` are the numbers of the head
    of each class; it is empty if all classes have one head.
    """

    classes: int
    bins: int = 0
    groups: tuple[str, ...] = ()
    fewest: int = 1
    heads: tuple[int, ...] = ()

    most_parts = 1  # an example is counted once
    loss_limit = TALLY_LIMIT

    @cached_property
    def size(self) -> int:
        """Return the number of additional counts beside the confusion matrix."""
        return (
            2 * ((self.classes + 1) * self.bins + len(self.groups))
            if self.bins
            else (2 * len(self.groups))
        )

    @property
    def named(self) -> tuple[str, ...]:
        """Return the names of the additional counts; it is empty if the job asks for none."""
        return (f"bins {self.bins}", *self.groups) if self.size else ()

    def collect(self, examples: Examples) -> "_Collector":
        """Return a collector of a model's predictions for ``examples``, batch by batch."""
        return _Collector(self, examples)

    def evaluation(self, value: Mapping[str, Any]) -> LabelEvaluation:
        """Return the evaluation that ``to_json`` wrote."""
        return LabelEvaluation.from_json(value)

    def count_scores(self, logits: NDArray[np.floating[Any]], true: Counts) -> Counts:
        """Return the counts of a batch of predictions: [size], zero where ``count_groups`` counts.

        Args:
            logits: float [examples, classes]; minus infinity for classes of another head.
            true: int64 [examples].
        """
        counts = np.zeros(self.size, np.int64)
        if not self.bins or not len(true):
            return counts
        scores, sure, _ = self._parts(counts)
        shares = _softmax(logits)
        rows = np.arange(len(true))
        with np.errstate(divide="ignore"):
            odds = np.log(shares) - np.log(_others(shares))
        at = _binned((odds + LOG_ODDS) / (2 * LOG_ODDS), self.bins)
        other = np.ones(at.shape, np.int64)
        other[rows, true] = 0
        classes = np.broadcast_to(np.arange(self.classes), at.shape)
        possible = np.asarray(logits) > -np.inf
        np.add.at(scores, (classes[possible], other[possible], at[possible]), 1)
        predicted = np.asarray(logits).argmax(1)
        confidence = _binned(shares[rows, predicted], self.bins)
        np.add.at(sure, ((predicted != true).astype(np.int64), confidence), 1)
        return counts

    def count_groups(self, groups: Counts, correct: NDArray[np.bool_]) -> Counts:
        """Return the counts of examples by group: [size], zero elsewhere.

        ``groups`` are int64 [examples]; -1 means no group.
        """
        counts = np.zeros(self.size, np.int64)
        known = groups >= 0
        wrong = (~correct).astype(np.int64)
        np.add.at(self._parts(counts)[2], (groups[known], wrong[known]), 1)
        return counts

    def without_few(self, counts: Counts) -> Counts:
        """Return ``counts`` with zeros for every group with fewer than ``fewest`` examples."""
        kept = counts.copy()
        groups = self._parts(kept)[2]
        groups[groups.sum(1) < self.fewest] = 0
        return kept

    def fits(self, tally: Tally) -> bool:
        """Return whether the counts of ``tally`` can belong to its confusion matrix."""
        if tally.more.shape != (self.size,) or (tally.more < 0).any():
            return False
        scores, sure, groups = self._parts(tally.more)
        support, right = tally.confusion.sum(1), tally.correct
        of_class = np.stack([support, self._of_head(support) - support], axis=1)
        by_outcome = np.array([right, tally.examples - right])
        return bool(
            (not self.bins or np.array_equal(scores.sum(2), of_class))
            and (not self.bins or np.array_equal(sure.sum(1), by_outcome))
            and (groups.sum(0) <= by_outcome).all()
        )

    def figures(self, tally: Tally) -> dict[str, Any]:
        """Return all metrics of a model from ``tally``: fractions 0..1, and the ``loss`` in nats.

        The loss is the mean over the examples.
        """
        return {**tally.summary(), **self.summary(tally)}

    def summary(self, tally: Tally) -> dict[str, Any]:
        """Return the metrics from the additional counts of ``tally``; {} if the job asks for none.

        ``auroc`` (one class against the others of its head, the mean over the classes with both
        kinds of examples) with ``auroc_error``; ``calibration_error`` with
        ``calibration_error_bound``; ``groups`` with the ``examples`` and ``accuracy`` of each group
        (None for a group with too few examples); and ``accuracy_gap``, the largest difference
        between two shown groups. A metric is None if it cannot be computed.
        """
        scores, sure, groups = self._parts(tally.more)
        found: dict[str, Any] = {}
        if self.bins:
            ranked, error = _auroc(scores)
            found |= {
                "auroc": ranked,
                "auroc_error": error,
                "calibration_error": _calibration_error(sure) if tally.examples else None,
                "calibration_error_bound": 0.5 / self.bins,
            }
        if self.groups:
            found |= self._by_group(groups)
        return found

    def _of_head(self, support: Counts) -> Counts:
        """Return the examples of the head of each class, [classes]."""
        heads = np.array(self.heads or [0] * self.classes)
        totals: Counts = np.bincount(heads, weights=support).astype(np.int64)[heads]
        return totals

    def _by_group(self, groups: Counts) -> dict[str, Any]:
        shown = {
            name: {"examples": int(sum(row)), "accuracy": int(row[0]) / int(sum(row))}
            if sum(row) >= max(self.fewest, 1)
            else None
            for name, row in zip(self.groups, groups, strict=True)
        }
        known = [one["accuracy"] for one in shown.values() if one is not None]
        gap = max(known) - min(known) if len(known) > 1 else None
        return {"groups": shown, "accuracy_gap": gap}

    def _parts(self, counts: Counts) -> tuple[Counts, Counts, Counts]:
        """Return views of ``scores``, ``sure`` and ``groups`` into ``counts``."""
        first = 2 * self.classes * self.bins
        second = first + 2 * self.bins
        return (
            counts[:first].reshape(self.classes, 2, self.bins),
            counts[first:second].reshape(2, self.bins),
            counts[second:].reshape(len(self.groups), 2),
        )


class _Collector:
    """A collector of predictions; it restores the order of the examples."""

    def __init__(self, measures: LabelMeasures, examples: Examples) -> None:
        self._measures, self._groups = measures, examples.groups
        self._true = np.zeros(len(examples), np.int64)
        self._predicted = np.zeros(len(examples), np.int64)
        self._more = np.zeros(measures.size, np.int64)
        self._loss = 0.0

    def add(self, index: Indices, found: Mapping[str, Any]) -> None:
        """Add a batch: its summed ``loss`` (nats), ``true`` and ``predicted`` labels, ``logits``.

        ``index``, int64 [b], are the examples; labels are int64 [b], ``logits`` are float [b,
        classes].
        """
        self._loss += found["loss"]
        self._true[index], self._predicted[index] = found["true"], found["predicted"]
        if self._measures.bins:
            self._more += self._measures.count_scores(found["logits"], found["true"])

    def evaluation(self) -> LabelEvaluation:
        """Return the evaluation of all added examples."""
        if self._groups is not None:
            right = self._true == self._predicted
            self._more += self._measures.count_groups(self._groups, right)
        classes = self._measures.classes
        return LabelEvaluation(self._loss, self._true, self._predicted, classes, self._more)


def _softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return probabilities in double precision.

    Near 1, single precision is too coarse for log-odds.
    """
    shifted = np.asarray(logits, np.float64)
    shares = np.exp(shifted - shifted.max(1, keepdims=True))
    total: NDArray[np.float64] = shares / shares.sum(1, keepdims=True)
    return total


def _others(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 - p, at least 0."""
    return np.maximum(1 - shares, 0.0)


def _binned(values: NDArray[np.float64], bins: int) -> Counts:
    """Return the bin of each value in 0..1; outside values go to the first or the last bin."""
    # Not floor(x * bins): an edge such as 0.3 must equal 3 / 10, as in other implementations.
    edges = np.arange(1, bins) / bins
    return np.searchsorted(edges, values, side="right").astype(np.int64)


def _auroc(scores: Counts) -> tuple[float | None, float | None]:
    """Return the mean AUROC over classes with both kinds of examples, and its largest error."""
    areas, errors = [], []
    for own, other in scores.astype(np.float64):
        pairs = own.sum() * other.sum()
        if pairs:
            below = np.cumsum(other) - other
            tied = float((own * other).sum() / pairs)
            areas.append(float((own * below).sum() / pairs) + tied / 2)
            errors.append(tied / 2)
    return (float(np.mean(areas)), float(np.mean(errors))) if areas else (None, None)


def _calibration_error(sure: Counts) -> float:
    """Return the mean distance of a bin's accuracy from its confidence.

    Bins are weighted by their examples.
    """
    bins = sure.shape[1]
    middles = (np.arange(bins) + 0.5) / bins
    coarse = sure.reshape(2, CALIBRATION_BINS, -1)
    confident = (sure.sum(0) * middles).reshape(CALIBRATION_BINS, -1).sum(1)
    return float(np.abs(coarse[0].sum(1) - confident).sum() / sure.sum())
