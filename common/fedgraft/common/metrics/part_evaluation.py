"""The results of a model on examples made of parts: blocks of tokens, images of patches.

The tokens of a block depend on one another: one unknown word affects several tokens. If each token
counted as an independent draw, every interval would be far too narrow. So whole blocks are
resampled, each with all its tokens. Both models read the same blocks. The comparison uses the loss
in nats per token; perplexity is e to the power of this loss. An image counts as a block of hidden
patches, and its loss is the mean absolute error.

Blocks are treated as independent draws. For neighbouring blocks of one document this is not fully
true.
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
    "block_verdict",
    "part_intervals",
]

LARGEST_EXPONENT = 700.0  # of e: a larger one overflows, and JSON has no infinity

Blocks = npt.NDArray[Any]


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
    metric=Metric("perplexity", "perplexity", percent=False, higher=False),
    exponential=True,
    difference="loss {:+.3f} nats a token",
    one="1 block of text",
    many="blocks of text",
)
PATCHES = PartWords(
    parts="patches",
    metric=Metric("loss", "reconstruction error", percent=False, higher=False),
    exponential=False,
    difference="error {:+.3f} a pixel",
    one="1 image",
    many="images",
)
WORDS = {words.parts: words for words in (TOKENS, PATCHES)}


@dataclass(frozen=True)
class PartEvaluation:
    """The summed loss and the number of correct parts of each block or image, in order.

    ``losses`` are float64 (nats), ``right`` and ``counted`` are int64, all [blocks]. Tokens of a
    block, and patches of an image, depend on one another, so only whole blocks can be resampled.
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
        """Compare this model, the federated one, with ``other`` on the same blocks.

        ``name`` is the site.
        """
        return block_verdict(
            self.losses,
            other.losses,
            self.counted,
            name=name,
            generator=generator,
            rival=rival,
            words=self.words,
        ).to_json()

    def joined(self, others: "Sequence[PartEvaluation]") -> "PartEvaluation":
        """Return one evaluation of the blocks of this one and of ``others``, in order."""
        columns = zip(
            *((one.losses, one.right, one.counted) for one in (self, *others)), strict=True
        )
        losses, right, counted = (np.concatenate(column) for column in columns)
        return PartEvaluation(losses, right, counted, self.words)

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON values: three sums per block."""
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
    """A collector of sums per example; it restores the order of the examples."""

    def __init__(self, measures: PartMeasures, examples: Examples) -> None:
        self._words = measures.words
        self._losses = np.zeros(len(examples))
        self._right, self._counted = np.zeros((2, len(examples)), np.int64)

    def add(self, index: Indices, found: Mapping[str, Any]) -> None:
        """Add a batch: ``losses``, ``right`` and ``counted`` parts, summed for each example.

        ``index``, int64 [b], are the examples; each of the others is [b].
        """
        self._losses[index] = found["losses"]
        self._right[index], self._counted[index] = found["right"], found["counted"]

    def evaluation(self) -> PartEvaluation:
        """Return the evaluation of all added examples."""
        return PartEvaluation(self._losses, self._right, self._counted, self._words)


def part_intervals(
    losses: Blocks,
    right: Blocks,
    counted: Blocks,
    generator: np.random.Generator,
    words: PartWords = TOKENS,
) -> dict[str, list[float]]:
    """Return 95 % intervals of the headline metric and ``accuracy``, as ``KEY_interval``.

    Args:
        losses: float [blocks], summed over a block's tokens, nats.
        right: int [blocks], correctly predicted tokens.
        counted: int [blocks], tokens.
        generator: the source of the random draws.
        words: the words for blocks and their parts.

    Returns:
        {} for fewer than two blocks, because they cannot be resampled.
    """
    if np.count_nonzero(counted) < 2:
        return {}
    sums = redrawn_sums(np.stack([losses, right, counted]), generator)
    loss, accuracy = (percentile_interval(sums[at] / sums[2]) for at in (0, 1))
    shown = [words.value(end) for end in loss]
    return {f"{words.metric.key}_interval": shown, "accuracy_interval": list(accuracy)}


def block_verdict(
    federated: Blocks,
    other: Blocks,
    counted: Blocks,
    *,
    name: str,
    generator: np.random.Generator,
    rival: Rival = "local_only",
    words: PartWords = TOKENS,
) -> Verdict:
    """Compare the losses of two models on the same blocks of the site ``name``.

    Args:
        federated: float [blocks], the federated model's loss summed over a block, nats.
        other: float [blocks], the other model's loss on the same blocks.
        counted: int [blocks], tokens of a block.
        name: the site's name in the sentence; it is not escaped.
        generator: the source of the random draws.
        rival: the other model: the site's own model, or the backbone without training.
        words: the words for blocks and their parts.

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
