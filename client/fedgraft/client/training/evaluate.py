"""Evaluate an adapter on a site's examples. Only sums leave the site; predictions stay."""

from collections.abc import Mapping
from typing import Any

import torch

from fedgraft.client.data.batches import Passes, by_length
from fedgraft.client.data.cache import Store
from fedgraft.client.model.batched_model import Stack
from fedgraft.client.model.forward import open_feed, predict
from fedgraft.common.examples import Examples, Indices
from fedgraft.common.layout import Layout, Vector
from fedgraft.common.metrics.evaluation import Evaluation, Measures

__all__ = ["measure"]


def measure(
    stack: Stack,
    trained: Layout,
    vector: Vector,
    examples: Examples,
    *,
    measures: Measures,
    store: Store | None = None,
) -> Evaluation:
    """Evaluate the adapter ``vector``, float32 [trained.size], on all of ``examples``.

    ``measures`` defines the counts. Examples are batched by length, to have little padding. If
    memory does not suffice for a batch, it is halved.

    Raises:
        SiteFailure: ``out-of-memory``: memory does not suffice for one example.
    """
    collector = measures.collect(examples)
    feed = open_feed(stack, trained, examples, store)
    outputs = stack.bench.task.outputs(stack.model.config)
    size = stack.objective.at_once(outputs, examples.longest)
    stack.put_one(trained, vector)

    def counts(index: Indices) -> Mapping[str, Any]:
        predicted, targets = predict([feed], [index], feed.width(index))
        return stack.objective.counts(predicted, targets)

    passes = Passes(size)
    with torch.inference_mode():
        for batch in by_length(examples, size):
            for index, found in passes.over(batch, counts):
                collector.add(index, found)
    evaluation: Evaluation = collector.evaluation()
    return evaluation
