"""Evaluate an adapter on a site's examples. Only sums leave the site; predictions stay."""

import torch

from fedgraft.client.data.batches import by_length
from fedgraft.client.data.cache import Store
from fedgraft.client.model.batched_model import Stack
from fedgraft.client.model.forward import open_feed, predict
from fedgraft.common.examples import Examples
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

    ``measures`` defines the counts. Examples are batched by length, to have little padding.
    """
    collector = measures.collect(examples)
    feed = open_feed(stack, trained, examples, store)
    outputs = stack.bench.task.outputs(stack.model.config)
    size = stack.objective.at_once(outputs, examples.longest)
    stack.put_one(trained, vector)
    with torch.inference_mode():
        for index in by_length(examples, size):
            predicted, targets = predict([feed], [index], feed.width(index))
            collector.add(index, stack.objective.counts(predicted, targets))
    found: Evaluation = collector.evaluation()
    return found
