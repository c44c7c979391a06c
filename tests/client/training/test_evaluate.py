"""Evaluation counts every example once, whatever the batches."""

import numpy as np
import pytest
import torch
from support.evaluations import measured_labels
from support.trainings import digits, noisy, open_small, rows_for, settings, texts, trained

from fedgraft.client.data.batches import as_tensors
from fedgraft.common.metrics.measures import LabelMeasures


@pytest.mark.parametrize("kind", ["vit", "resnet", "bert", "gpt2"])
def test_evaluation_counts_every_example_once_in_order(kind: str) -> None:
    stack, examples = open_small(kind), rows_for(kind, 150)  # more than two batches
    vector = noisy(stack.bench)
    measured = measured_labels(stack, stack.bench.layout, vector, examples, LabelMeasures(10))
    stack.bench.put((stack.bench.layout, vector))
    with torch.inference_mode():
        logits = stack.bench.model(**as_tensors(examples.batch(np.arange(150)))).logits
    labels = torch.from_numpy(examples.labels)
    right = (logits.argmax(-1) == labels).numpy()
    assert np.array_equal(measured.correct, right)
    assert measured.tally.examples == 150
    assert measured.tally.correct == right.sum()
    counted = np.bincount(examples.labels, minlength=10)
    assert measured.tally.confusion.sum(1).tolist() == counted.tolist()
    wanted = float(torch.nn.functional.cross_entropy(logits, labels))
    assert measured.tally.mean_loss == pytest.approx(wanted, rel=1e-5)


def test_rows_of_any_order_and_length_come_to_the_same() -> None:
    stack, examples = open_small("bert"), texts(100)
    layout, vector = stack.bench.layout, noisy(stack.bench)
    plain = measured_labels(stack, layout, vector, examples, LabelMeasures(10))
    order = np.random.default_rng(3).permutation(100)
    other = measured_labels(stack, layout, vector, examples.subset(order), LabelMeasures(10))
    assert np.array_equal(other.correct, plain.correct[order])
    assert np.array_equal(other.tally.confusion, plain.tally.confusion)
    assert other.tally.loss == pytest.approx(plain.tally.loss, rel=1e-5)


def test_tensors_that_are_not_given_are_the_initial_ones() -> None:
    stack, examples = open_small("vit"), digits(40)
    layout, vector = stack.bench.layout, noisy(stack.bench)
    part = layout.only(layout.names[:3])
    whole = layout.merged(stack.bench.initial, (part, layout.part(vector, part)))
    measured_labels(stack, layout, vector, examples, LabelMeasures(10))  # leaves nothing behind
    some = measured_labels(stack, part, layout.part(vector, part), examples, LabelMeasures(10))
    every = measured_labels(stack, layout, whole, examples, LabelMeasures(10))
    assert some.tally.loss == pytest.approx(every.tally.loss, rel=1e-6)
    assert (
        some.tally.loss
        != measured_labels(stack, layout, vector, examples, LabelMeasures(10)).tally.loss
    )


def test_evaluation_is_in_eval_mode_whatever_the_peft_model_is_in() -> None:
    stack = open_small("bert")
    layout, vector = stack.bench.layout, stack.bench.initial
    quiet = measured_labels(stack, layout, vector, texts(), LabelMeasures(10)).tally.loss
    stack.bench.model.train()
    try:
        loud = measured_labels(stack, layout, vector, texts(), LabelMeasures(10)).tally.loss
    finally:
        stack.bench.model.eval()
    assert loud == quiet


def test_evaluation_after_training_draws_nothing() -> None:
    stack, examples = open_small("bert", dropout=0.5), texts()
    layout, vector = stack.bench.layout, noisy(stack.bench)
    before = measured_labels(stack, layout, vector, examples, LabelMeasures(10)).tally.loss
    trained(stack, examples, settings(dropout=0.5))
    assert measured_labels(stack, layout, vector, examples, LabelMeasures(10)).tally.loss == before


def test_no_examples_are_an_empty_tally() -> None:
    stack = open_small("vit")
    nothing = digits(8).subset(np.empty(0, np.int64))
    found = measured_labels(
        stack, stack.bench.layout, stack.bench.initial, nothing, LabelMeasures(10)
    )
    assert found.tally.examples == 0 and len(found.correct) == 0
