"""Passes over examples take fewer at a time where memory is short, and count the same."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from support.evaluations import measured_labels
from support.matrix import thinned
from support.trainings import TOP, digits, make_job, noisy, open_small, rows_for, settings, trained

from fedgraft.client.data.batches import Passes
from fedgraft.client.data.teacher import _logits
from fedgraft.client.model.batched_model import Stack, open_stack
from fedgraft.client.model.forward import compute, open_feed
from fedgraft.client.selection.features import features_of
from fedgraft.client.selection.zero_shot import DualEncoder
from fedgraft.client.training.ewc import fisher_information
from fedgraft.common.errors import SiteFailure
from fedgraft.common.metrics.measures import LabelMeasures

SHORT: dict[str, Callable[[], Exception]] = {
    "device": torch.OutOfMemoryError,
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    ),
    "numpy": MemoryError,
}
each_kind = pytest.mark.parametrize("short", SHORT)


@contextmanager
def memory_for(rows: int, model: torch.nn.Module, short: str = "device") -> Iterator[list[int]]:
    """Have a pass of the model with more than so many rows run out of memory, at its end."""
    tried: list[int] = []

    def leaving(module: object, args: object, given: dict[str, Any], output: Any) -> None:
        tried.append(len(next(iter(given.values()))))
        if tried[-1] > rows:
            raise SHORT[short]()

    handle = model.register_forward_hook(leaving, with_kwargs=True)
    try:
        yield tried
    finally:
        handle.remove()


@each_kind
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("kind", thinned(["vit", "resnet", "bert", "gpt2"], 2))
def test_an_evaluation_counts_the_same(kind: str, rows: int, short: str) -> None:
    stack, examples = open_small(kind), rows_for(kind, 70)
    layout, vector = stack.bench.layout, noisy(stack.bench)
    enough = measured_labels(stack, layout, vector, examples, LabelMeasures(10))
    with memory_for(rows, stack.model, short) as tried:
        found = measured_labels(stack, layout, vector, examples, LabelMeasures(10))
    assert np.array_equal(found.correct, enough.correct)
    assert np.array_equal(found.tally.confusion, enough.tally.confusion)
    assert found.tally.loss == pytest.approx(enough.tally.loss, rel=1e-5)
    assert [size for size in tried if size > rows] == {
        1: [64, 32, 16, 8, 4, 2], 20: [64, 32],
    }[rows]  # found out once  # fmt: skip


@each_kind
def test_training_halves_for_every_kind_of_short_memory(short: str) -> None:
    stack, wanted = open_small("vit"), settings(epochs=2)
    enough = trained(stack, digits(), wanted)
    with memory_for(3, stack.model, short) as tried:
        found = trained(stack, digits(), wanted)
    assert tried[:3] == [8, 4, 2]
    np.testing.assert_allclose(found.vector, enough.vector, rtol=0, atol=1e-6)


def test_where_one_example_is_too_much_the_site_says_so() -> None:
    stack = open_small("vit")
    with memory_for(0, stack.model), pytest.raises(SiteFailure, match="out-of-memory"):
        measured_labels(stack, stack.bench.layout, noisy(stack.bench), digits(5), LabelMeasures(10))


def test_another_error_is_not_taken_for_short_memory() -> None:
    def fail(index: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(Passes(8).over(np.arange(10), fail))


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("fits", [1, 5])
def test_every_example_is_passed_once_and_in_order(size: int, fits: int) -> None:
    def work(index: Any) -> int:
        if len(index) > fits:
            raise MemoryError
        return len(index)

    parts = list(Passes(size).over(np.arange(23), work))
    assert np.array_equal(np.concatenate([index for index, _ in parts]), np.arange(23))
    assert all(len(index) == count <= fits for index, count in parts)


def test_frozen_layers_are_passed_in_pieces_of_the_same_bits() -> None:
    stack, examples = open_small("bert", targets=TOP["bert"]), rows_for("bert", 50)
    feed = open_feed(stack, stack.bench.layout, examples, None)
    assert feed.prefix is not None and feed.prefix.by_token
    found = []
    for rows in (64, 9):
        out = feed.prefix.unit.new_empty(int(examples.lengths.sum()), *feed.prefix.unit.shape[1:])
        with memory_for(rows, first_layer(stack)) as tried:
            compute(feed.prefix, examples, np.arange(50), out)
        found.append(out.numpy().tobytes())
    assert found[0] == found[1] and max(tried) > 9 and min(tried) == 8
    with memory_for(7, first_layer(stack)), pytest.raises(SiteFailure, match="out-of-memory"):
        compute(feed.prefix, examples, np.arange(50), out)


def first_layer(stack: Stack) -> torch.nn.Module:
    """The embeddings: what is passed over by a stop never gives an output."""
    return stack.model.get_submodule("bert.embeddings")


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_features_are_the_same(kind: str) -> None:
    stack, examples = open_small(kind, kind="head"), rows_for(kind, 70)
    enough = features_of(stack, examples)
    with memory_for(5, stack.model):
        found = features_of(stack, examples)
    np.testing.assert_allclose(found.values, enough.values, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.probabilities, enough.probabilities, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_a_teacher_says_the_same(kind: str) -> None:
    stack, examples = open_small(kind), rows_for(kind, 70)
    model: Any = stack.bench.model.get_base_model().eval()
    enough = _logits(model, examples, stack.device)
    with memory_for(5, model):
        found = _logits(model, examples, stack.device)
    np.testing.assert_allclose(found, enough, rtol=0, atol=1e-4)


def test_a_dual_encoder_gives_the_same_answers() -> None:
    class Encoder:
        def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
            if len(pixel_values) > 9:
                raise torch.OutOfMemoryError
            return pixel_values.flatten(1)

    examples = digits(40)
    prompts = torch.from_numpy(examples.values[:10].reshape(10, -1))
    answers = DualEncoder(Encoder(), prompts).answers(examples)
    wanted = examples.values.reshape(40, -1) @ prompts.numpy().T
    assert np.array_equal(answers, wanted.argmax(1))


def test_fisher_information_is_the_same() -> None:
    stack = open_stack(make_job("vit", training={"consolidation": {}}))
    layout, vector = stack.bench.layout, noisy(stack.bench)
    feed = open_feed(stack, layout, digits(20), None)
    enough = fisher_information(stack, layout, feed, vector)
    with memory_for(3, stack.model):
        found = fisher_information(stack, layout, feed, vector)
    np.testing.assert_allclose(found, enough, rtol=1e-4, atol=1e-9)
