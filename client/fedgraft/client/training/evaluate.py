"""Measure an adapter on a site's examples; only sums leave, the predictions stay."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft.client.data.cache import Store
from fedgraft.client.model.batched_model import Stack
from fedgraft.client.model.forward import open_feed, predict
from fedgraft.client.objectives.labels import BlockCounts, Counts
from fedgraft.common.examples import Examples
from fedgraft.common.layout import Layout, Vector
from fedgraft.common.metrics.measures import Measures
from fedgraft.common.metrics.tally import Tally
from fedgraft.common.tasks import Target

__all__ = ["Evaluation", "Measured", "PartEvaluation", "evaluate", "evaluate_parts", "measure"]

BATCH = 64
LOGITS = 1 << 25  # in memory at once: 128 MB; a vocabulary is large


@dataclass(frozen=True)
class Evaluation:
    """The summed ``loss`` (nats), true and predicted labels, both int64 [examples], in their order.

    What follows from them is worked out when asked for: thousands of sites' confusion matrices,
    most of them zeros, need not be held. ``more`` is what ``measures`` counts beside.
    """

    loss: float
    true: NDArray[np.int64]
    predicted: NDArray[np.int64]
    classes: int
    more: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def tally(self) -> Tally:
        """The sums."""
        return Tally.of(self.loss, self.true, self.predicted, self.classes, self.more)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which examples were predicted right, bool [examples]."""
        correct: NDArray[np.bool_] = self.predicted == self.true
        return correct


@dataclass(frozen=True)
class PartEvaluation:
    """Of each block or image, in their order: the summed loss, and its parts that are right.

    ``losses`` float64 (nats), ``right`` and ``counted`` int64, all [blocks]. Tokens of a block and
    patches of an image depend on one another, so that blocks and not parts are what can be redrawn.
    """

    losses: NDArray[np.float64]
    right: NDArray[np.int64]
    counted: NDArray[np.int64]
    target: Target = "tokens"

    @property
    def tally(self) -> Tally:
        """The sums: a right part is of class 0, as it should be, a wrong one of class 1."""
        right, counted = int(self.right.sum()), int(self.counted.sum())
        confusion = np.array([[right, counted - right], [0, 0]], np.int64)
        return Tally(float(self.losses.sum()), confusion)


Measured = Evaluation | PartEvaluation


def measure(
    stack: Stack,
    trained: Layout,
    vector: Vector,
    examples: Examples,
    *,
    measures: Measures,
    store: Store | None = None,
) -> Measured:
    """Evaluate the adapter ``vector`` as its job's ``measures`` say."""
    if measures.parts:
        found = evaluate_parts(stack, trained, vector, examples, store)
        return replace(found, target=measures.target)
    return evaluate(stack, trained, vector, examples, measures=measures, store=store)


def evaluate(
    stack: Stack,
    trained: Layout,
    vector: Vector,
    examples: Examples,
    *,
    measures: Measures,
    store: Store | None = None,
) -> Evaluation:
    """Evaluate the adapter ``vector``, float32 [trained.size], on all of ``examples``.

    They are batched by length, so that little is padding.
    """
    parts: list[Counts] = []
    more = np.zeros(measures.size, np.int64)
    feed = open_feed(stack, trained, examples, store)
    order = np.argsort(np.asarray(examples.lengths), kind="stable")
    stack.put_one(trained, vector)
    with torch.inference_mode():
        for start in range(0, len(examples), BATCH):
            index = order[start : start + BATCH]
            width = feed.width(index)
            logits, targets = predict([feed], [index], width)
            parts.append(Counts.of(logits, targets))
            if measures.bins:
                more += measures.count_scores(logits.float().cpu().numpy(), parts[-1].true.numpy())
    none = torch.empty(0, dtype=torch.int64)
    true, predicted = (
        torch.cat([none, *(getattr(part, name) for part in parts)]).numpy()
        for name in ("true", "predicted")
    )
    back = np.argsort(order)
    loss = sum(part.loss for part in parts)
    true, predicted = true[back], predicted[back]
    if examples.groups is not None:
        more += measures.count_groups(examples.groups, true == predicted)
    return Evaluation(loss, true, predicted, measures.classes, more)


def evaluate_parts(
    stack: Stack, trained: Layout, vector: Vector, examples: Examples, store: Store | None
) -> PartEvaluation:
    """As ``evaluate`` where tokens or patches are predicted.

    Fewer blocks at once where they are long and the vocabulary is large.
    """
    lengths = np.asarray(examples.lengths)
    order = np.argsort(lengths, kind="stable")
    losses = np.zeros(len(order))
    right, counted = np.zeros((2, len(order)), np.int64)
    feed = open_feed(stack, trained, examples, store)
    stack.put_one(trained, vector)
    size = _blocks_at_once(stack, examples)
    with torch.inference_mode():
        for start in range(0, len(order), size):
            index = order[start : start + size]
            width = feed.width(index)
            found = BlockCounts.of(*predict([feed], [index], width))
            losses[index] = found.losses.cpu().numpy()
            right[index], counted[index] = found.right.cpu().numpy(), found.counted.cpu().numpy()
    return PartEvaluation(losses, right, counted)


def _blocks_at_once(stack: Stack, examples: Examples) -> int:
    words = int(getattr(stack.model.config, "vocab_size", 1))
    return max(1, min(BATCH, LOGITS // (words * max(examples.longest, 1))))
