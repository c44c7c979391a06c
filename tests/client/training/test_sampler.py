"""Batches hold every example once an epoch; grouping by length saves padding and nothing else."""

from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.trainings import digits, settings, task, texts

from fedgraft.client.training.sampler import MEGABATCH, shuffled
from fedgraft.common.examples import Examples

NO_START = np.empty(0, np.float32)


def batches(examples: Examples, epochs: int = 1, seed: int = 1, **changes: Any) -> list[list[int]]:
    mine = task(examples, NO_START, seed=seed)
    return [
        batch.tolist()
        for batch in shuffled(mine.examples, mine.generator, epochs, settings(**changes))
    ]


@given(
    count=st.integers(1, 90),
    size=st.integers(1, 9),
    epochs=st.integers(1, 3),
    grouped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_epoch_has_every_example_once_in_whole_batches(
    count: int, size: int, epochs: int, grouped: bool, seed: int
) -> None:
    examples = texts(count, seed)
    found = batches(examples, epochs, seed, batch_size=size, group_by_length=grouped)
    each = -(-count // size)
    assert len(found) == each * epochs
    for epoch in range(epochs):
        mine = found[epoch * each : (epoch + 1) * each]
        assert sorted(chain.from_iterable(mine)) == list(range(count))
        assert [len(batch) for batch in mine[:-1]] == [size] * (each - 1)  # the partial one is last


@pytest.mark.parametrize("grouped", [False, True])
def test_batches_come_from_the_sites_generator(grouped: bool) -> None:
    examples = texts(40)
    first = batches(examples, 2, group_by_length=grouped)
    torch.manual_seed(3)
    assert batches(examples, 2, group_by_length=grouped) == first
    assert batches(examples, 2, seed=2, group_by_length=grouped) != first
    assert first[:5] != first[5:]  # another order in each epoch


def padding(examples: Examples, found: list[list[int]]) -> int:
    lengths = np.asarray(examples.lengths)
    return sum(int(len(b) * lengths[b].max() - lengths[b].sum()) for b in found)


def test_grouped_batches_hold_texts_of_about_one_length() -> None:
    examples = texts(200)
    plain, grouped = (batches(examples, 4, group_by_length=on) for on in (False, True))
    assert padding(examples, grouped) < padding(examples, plain) / 4


def test_grouped_batches_come_in_random_order() -> None:
    examples = texts(8 * MEGABATCH)
    longest = [int(examples.lengths[b].max()) for b in batches(examples, group_by_length=True)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_each_stretch_is_sorted_and_cut_by_itself() -> None:
    """Of one stretch the batches are known, and none straddles two of them."""
    examples = texts(8 * MEGABATCH - 3)
    lengths = np.asarray(examples.lengths)
    found = [sorted(lengths[batch]) for batch in batches(examples, group_by_length=True)]
    ordered = np.sort(lengths)
    wanted = [ordered[at : at + 8].tolist() for at in range(0, len(ordered), 8)]
    assert sorted(found) == sorted(wanted)
    assert found[-1] == wanted[-1] and len(wanted[-1]) == 5


def test_an_epoch_is_more_than_one_sorted_list() -> None:
    examples = texts(8 * MEGABATCH * 2)
    found = batches(examples, group_by_length=True)
    members = {example: number for number, batch in enumerate(found) for example in batch}
    order = np.argsort(np.asarray(examples.lengths), kind="stable")
    together = sum(members[a] == members[b] for a, b in pairwise(order))
    assert together < len(order) * 0.8


def test_images_are_batched_as_they_come() -> None:
    """All are as long: sorting keeps the random order within a stretch."""
    found = batches(digits(40), group_by_length=True)
    plain = batches(digits(40))
    assert sorted(map(sorted, found)) == sorted(map(sorted, plain))
