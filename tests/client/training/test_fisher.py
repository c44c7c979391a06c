"""What consolidation measures is the diagonal of the empirical Fisher information."""

from typing import Any

import numpy as np
import pytest
import torch
from support.trainings import digits, make_job, noisy, rows_for, settings, task

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.model.batched_model import Stack, open_stack
from fedgraft.client.training.trainer import Trained, train
from fedgraft.common.adapters.fisher import NEW
from fedgraft.common.config.compatibility import SCALE
from fedgraft.common.examples import Examples
from fedgraft.common.layout import Vector


def brute_force(stack: Stack, rows: Examples, vector: Vector) -> Vector:
    """The mean of squared gradients of single examples, with PEFT's own model, float64."""
    bench, layout = stack.bench, stack.bench.layout
    model = bench.model.eval()
    bench.put((layout.of_model, layout.part(vector, layout.of_model)))
    pairs = dict(model.named_parameters())
    names = bench.carried.names
    for name in names:
        pairs[name].requires_grad_(True)
    squares = np.zeros(bench.carried.size)
    for row in range(len(rows)):
        model.zero_grad()
        index = np.array([row])
        logits = model(**as_tensors(rows.batch(index))).logits
        wanted = torch.from_numpy(rows.labels[index])
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, wanted))
        flat = [pairs[name].grad.double().flatten().numpy() for name in names]
        squares += np.concatenate(flat) ** 2 / len(rows)
    bench.put()
    return squares.astype(np.float32)


def measured(vector: Vector, stack: Stack) -> Vector:
    found: Vector = vector[stack.bench.layout.slices[NEW]] / np.float32(SCALE)
    return found


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("vit", {}, {"batch_size": 1}),
    ("vit", {}, {"batch_size": 8}),
    ("vit", {"head": "local"}, {"batch_size": 5, "epochs": 2}),
    ("vit", {"dropout": 0.3}, {"batch_size": 12, "dropout": 0.3}),
    ("bert", {}, {"batch_size": 7, "label_smoothing": 0.2}),
    ("gpt2", {"kind": "head"}, {"batch_size": 16, "accumulation": 4}),
]


@pytest.mark.parametrize(("kind", "method", "training"), CASES, ids=str)
def test_it_is_that_of_single_examples_whatever_the_batches_are(
    kind: str, method: dict[str, Any], training: dict[str, Any]
) -> None:
    job = make_job(kind, training={"consolidation": {}}, **method)
    stack, rows = open_stack(job), rows_for(kind, 13)
    wanted = settings(consolidation={}, **training)
    (came,) = train(stack, stack.bench.layout, [task(rows, noisy(stack.bench))], settings=wanted)
    assert isinstance(came, Trained)
    expected = np.minimum(brute_force(stack, rows, came.vector), 1)
    assert expected.max() > 1e-4
    np.testing.assert_allclose(measured(came.vector, stack), expected, rtol=1e-3, atol=1e-5)


def test_sites_of_one_pass_measure_their_own_rows() -> None:
    stack = open_stack(make_job("vit", training={"consolidation": {}}))
    rows = [digits(6), digits(20, 50), digits(13, 100)]
    wanted = settings(consolidation={})
    tasks = [task(mine, noisy(stack.bench, seed=site)) for site, mine in enumerate(rows)]
    for mine, came in zip(
        rows, train(stack, stack.bench.layout, tasks, settings=wanted), strict=True
    ):
        assert isinstance(came, Trained)
        expected = np.minimum(brute_force(stack, mine, came.vector), 1)
        np.testing.assert_allclose(measured(came.vector, stack), expected, rtol=1e-3, atol=1e-5)
