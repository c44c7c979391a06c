"""The results of a model on examples made of parts: texts of tokens, images of patches.

The tokens of a text depend on one another: one unknown word affects several tokens, and blocks of
one text have one author and one subject. If each token or each block counted as an independent
draw, every interval would be far too narrow. So whole texts (``Examples.documents``) are resampled,
each with the tokens of all its blocks. Both models read the same texts. The comparison uses the
loss in nats per token; perplexity is e to the power of this loss. An image counts as a text of
hidden patches, and its loss is the mean absolute error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedgraft.common.examples import Examples, Indices
from fedgraft.common.metrics.evaluation import PARTS_LIMIT
from fedgraft.common.metrics.intervals import percentile_interval, permutation_test, redrawn_sums
from fedgraft.common.metrics.metric import Metric
from fedgraft.common.metrics.tally import Counts, Tally
from fedgraft.common.metrics.verdict import Rival, Verdict, judge, not_known, numbered, tell

__all__ = [
    "PATCHES",
    "TOKENS",
    "PartEvaluation",
    "PartMeasures",
    "PartWords",
    "part_intervals",
    "text_verdict",
]

LARGEST_EXPONENT = 700.0  # of e: a larger one overflows, and JSON has no infinity

Texts = npt.NDArray[Any]


@dataclass(frozen=True)
class PartWords:
    """The words for examples made of parts.

    ``parts`` is the plural of a part. ``metric`` is the headline metric; if ``exponential``, it is
    e to the power of the mean loss. ``difference`` is the pattern for a difference of two mean
    losses. ``one`` and ``many`` are the words for numbers of examples.
    """

    parts: str
    metric: Metric
    exponential: bool
    difference: str
    one: str
    many: str

    def value(self, loss: float) -> float:
        """Return the headline metric for a mean loss."""
        return math.exp(min(loss, LARGEST_EXPONENT)) if self.exponential else loss


TOKENS = PartWords(
    parts="tokens",
    metric=Metric("perplexity", "perplexity", percent=False, higher=False, parts="tokens"),
    exponential=True,
    difference="loss {:+.3f} nats a token",
    one="1 text",
    many="texts",
)
PATCHES = PartWords(
    parts="patches",
    metric=Metric("loss", "reconstruction error", percent=False, higher=False, parts="patches"),
    exponential=False,
    difference="error {:+.3f} a pixel",
    one="1 image",
    many="images",
)
WORDS = {words.parts: words for words in (TOKENS, PATCHES)}


@dataclass(frozen=True)
class PartEvaluation:
    """The summed loss and the number of correct parts of each text or image, in order.

    ``losses`` are float64 (nats), ``right`` and ``counted`` are int64, all [texts]. Tokens of a
    text, and patches of an image, depend on one another, so only whole texts can be resampled.
    """

    losses: npt.NDArray[np.float64]
    right: npt.NDArray[np.int64]
    counted: npt.NDArray[np.int64]
    words: PartWords = TOKENS

    @property
    def tally(self) -> Tally:
        """Return the sums; the true class of every part is 0.

        A correct part counts as predicted 0, a wrong part as predicted 1.
        """
        right, counted = int(self.right.sum()), int(self.counted.sum())
        confusion = np.array([[right, counted - right], [0, 0]], np.int64)
        return Tally(float(self.losses.sum()), confusion)

    def intervals(self, generator: np.random.Generator) -> dict[str, Any]:
        """Return 95 % intervals of the headline metric and of accuracy (``part_intervals``)."""
        return part_intervals(self.losses, self.right, self.counted, generator, self.words)

    def compare(
        self, other: "PartEvaluation", generator: np.random.Generator, *, name: str, rival: Rival
    ) -> dict[str, Any]:
        """Compare this model, the federated one, with ``other`` on the same texts.

        ``name`` is the site.
        """
        return text_verdict(
            self.losses,
            other.losses,
            self.counted,
            name=name,
            generator=generator,
            rival=rival,
            words=self.words,
        ).to_json()

    def joined(self, others: "Sequence[PartEvaluation]") -> "PartEvaluation":
        """Return one evaluation of the texts of this one and of ``others``, in order."""
        columns = zip(
            *((one.losses, one.right, one.counted) for one in (self, *others)), strict=True
        )
        losses, right, counted = (np.concatenate(column) for column in columns)
        return PartEvaluation(losses, right, counted, self.words)

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON values: three sums per text."""
        arrays = {key: getattr(self, key).tolist() for key in ("losses", "right", "counted")}
        return {**arrays, "target": self.words.parts}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PartEvaluation":
        """Return the evaluation that ``to_json`` wrote."""
        right, counted = (np.array(value[key], np.int64) for key in ("right", "counted"))
        losses = np.array(value["losses"], np.float64)
        return cls(losses, right, counted, WORDS[value.get("target", "tokens")])


@dataclass(frozen=True)
class PartMeasures:
    """The counts of a job with up to ``most_parts`` parts per example: correct and wrong parts.

    There are no additional counts.
    """

    most_parts: int
    words: PartWords

    classes = 2
    size = 0
    named: tuple[str, ...] = ()
    loss_limit = PARTS_LIMIT

    def fits(self, tally: Tally) -> bool:
        """Return whether there are no additional counts."""
        return tally.more.shape == (0,)

    def without_few(self, counts: Counts) -> Counts:
        """Return ``counts``, which are empty."""
        return counts

    def collect(self, examples: Examples) -> "_Collector":
        """Return a collector of a model's predictions for ``examples``, batch by batch."""
        return _Collector(self, examples)

    def evaluation(self, value: Mapping[str, Any]) -> PartEvaluation:
        """Return the evaluation that ``to_json`` wrote."""
        return PartEvaluation.from_json(value)

    def figures(self, tally: Tally) -> dict[str, Any]:
        """Return ``accuracy``, the headline metric, and ``loss``, all per part."""
        loss = tally.mean_loss
        headline = self.words.value(loss) if tally.examples or not self.words.exponential else 0.0
        return {"accuracy": tally.accuracy, self.words.metric.key: headline, "loss": loss}


class _Collector:
    """A collector of sums per document; documents are in the order of their numbers."""

    def __init__(self, measures: PartMeasures, examples: Examples) -> None:
        self._words = measures.words
        numbers, self._of = np.unique(examples.documents, return_inverse=True)
        self._losses = np.zeros(len(numbers))
        self._right, self._counted = np.zeros((2, len(numbers)), np.int64)

    def add(self, index: Indices, found: Mapping[str, Any]) -> None:
        """Add a batch: ``losses``, ``right`` and ``counted`` parts, summed for each example.

        ``index``, int64 [b], are the examples; each of the others is [b].
        """
        at = self._of[index]
        np.add.at(self._losses, at, found["losses"])
        np.add.at(self._right, at, found["right"])
        np.add.at(self._counted, at, found["counted"])

    def evaluation(self) -> PartEvaluation:
        """Return the evaluation of all added examples."""
        return PartEvaluation(self._losses, self._right, self._counted, self._words)


def part_intervals(
    losses: Texts,
    right: Texts,
    counted: Texts,
    generator: np.random.Generator,
    words: PartWords = TOKENS,
) -> dict[str, list[float]]:
    """Return 95 % intervals of the headline metric and ``accuracy``, as ``KEY_interval``.

    Args:
        losses: float [texts], summed over a text's tokens, nats.
        right: int [texts], correctly predicted tokens.
        counted: int [texts], tokens.
        generator: the source of the random draws.
        words: the words for texts and their parts.

    Returns:
        {} for fewer than two texts, because they cannot be resampled.
    """
    if np.count_nonzero(counted) < 2:
        return {}
    sums = redrawn_sums(np.stack([losses, right, counted]), generator)
    loss, accuracy = (percentile_interval(sums[at] / sums[2]) for at in (0, 1))
    shown = [words.value(end) for end in loss]
    return {f"{words.metric.key}_interval": shown, "accuracy_interval": list(accuracy)}


def text_verdict(
    federated: Texts,
    other: Texts,
    counted: Texts,
    *,
    name: str,
    generator: np.random.Generator,
    rival: Rival = "local_only",
    words: PartWords = TOKENS,
) -> Verdict:
    """Compare the losses of two models on the same texts of the site ``name``.

    Args:
        federated: float [texts], the federated model's loss summed over a text, nats.
        other: float [texts], the other model's loss on the same texts.
        counted: int [texts], tokens of a text.
        name: the site's name in the sentence; it is not escaped.
        generator: the source of the random draws.
        rival: the other model: the site's own model, or the backbone without training.
        words: the words for texts and their parts.

    Raises:
        ValueError: the three are not vectors of one length.
    """
    if federated.ndim != 1 or not federated.shape == other.shape == counted.shape:
        raise ValueError(f"three vectors of one length, not {federated.shape} and {other.shape}")
    kept = counted > 0
    federated, other, counted = federated[kept], other[kept], counted[kept]
    parts = int(counted.sum())
    if not parts:
        return Verdict("unknown", not_known(name, words.parts), 0.0, None, 1.0)
    gaps = federated - other
    difference = float(gaps.sum() / parts)
    interval, p_value = None, 1.0
    if len(gaps) > 1:
        sums = redrawn_sums(np.stack([gaps, counted]), generator)
        interval = percentile_interval(sums[0] / sums[1])
        p_value = permutation_test(gaps, generator)
    outcome = judge(interval, p_value, higher=False)
    ours, theirs = (
        words.metric.text(words.value(float(losses.sum()) / parts)) for losses in (federated, other)
    )
    span = "" if interval is None else f", 95 % interval {interval[0]:+.3f} to {interval[1]:+.3f}"
    gap = f"{words.difference.format(difference)}{span}"
    sentence = tell(
        outcome,
        name=name,
        rival=rival,
        shown=(f"{words.metric.name} {ours}", theirs),
        facts=f"{gap}, {numbered(len(gaps), words.one, words.many)}",
        p_value=p_value,
    )
    return Verdict(outcome, sentence, difference, interval, p_value)
