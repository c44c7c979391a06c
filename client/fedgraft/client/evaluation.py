"""Measure an adapter on a site's examples; only sums leave, the predictions stay."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft.client.examples import Examples
from fedgraft.client.feed import logits_of, open_feed, targets_of
from fedgraft.client.objectives import Counts
from fedgraft.client.stack import Stack
from fedgraft.client.store import Store
from fedgraft.common.adapters import Layout, Vector
from fedgraft.common.measures import Measures
from fedgraft.common.metrics import Tally

__all__ = ["Evaluation", "evaluate"]

BATCH = 64


@dataclass(frozen=True)
class Evaluation:
    """The summed ``loss`` (nats), true and predicted labels, both int64 [examples], in their order.

    Of texts whose tokens are predicted, each token counts as one (``objectives.Counts``).
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
            logits = logits_of([feed], [index], width)
            parts.append(Counts.of(logits, targets_of([feed], [index], width).to(logits.device)))
            if measures.bins:
                more += measures.count_scores(logits.float().cpu().numpy(), parts[-1].true.numpy())
    none = torch.empty(0, dtype=torch.int64)
    true, predicted = (
        torch.cat([none, *(getattr(part, name) for part in parts)]).numpy()
        for name in ("true", "predicted")
    )
    back = np.argsort(order) if len(true) == len(order) else np.arange(len(true))
    loss = sum(part.loss for part in parts)
    true, predicted = true[back], predicted[back]
    if examples.groups is not None:
        more += measures.count_groups(examples.groups, true == predicted)
    return Evaluation(loss, true, predicted, measures.classes, more)
