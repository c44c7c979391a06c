"""Encoded rows: the same rows have the same digest, and a batch may be wider than it must be."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.trainings import digits, texts

from fedgraft.client.data.batches import as_tensors
from fedgraft.common.examples import Examples, ImageExamples, TextExamples, concatenate

rows = st.lists(
    st.lists(st.tuples(st.integers(2, 9), st.integers(0, 1)), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)


def made(of: list[list[tuple[int, int]]], **changes: Any) -> TextExamples:
    """Texts of these tokens and token types."""
    lengths = np.array([len(text) for text in of])
    flat = [token for text in of for token in text]
    plain = TextExamples(
        labels=np.zeros(len(of), np.int64),
        ids=np.array([token for token, _ in flat], np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        types=np.array([kind for _, kind in flat], np.int8),
        pad_id=0,
        pad_left=False,
        longest=9,
    )
    return replace(plain, **changes)


@given(rows, rows)
def test_texts_have_the_same_digest_if_and_only_if_they_are_the_same(
    one: list[list[tuple[int, int]]], other: list[list[tuple[int, int]]]
) -> None:
    assert (made(one).digest == made(other).digest) == (one == other)
    assert made(one, labels=np.arange(len(one))).digest == made(one).digest
    for change in ({"pad_id": 1}, {"pad_left": True}, {"longest": 8}, {"types": None}):
        assert made(one, **change).digest != made(one).digest


@given(rows, st.data())
def test_a_part_has_the_digest_of_its_rows(
    of: list[list[tuple[int, int]]], data: st.DataObject
) -> None:
    index = data.draw(st.lists(st.integers(0, len(of) - 1), min_size=1, max_size=6))
    part = made(of).subset(np.array(index))
    assert part.digest == made([of[i] for i in index]).digest
    assert concatenate([made(of), part]).digest == made([*of, *(of[i] for i in index)]).digest


def test_images_have_the_digest_of_their_pixels() -> None:
    every, order = digits(12), np.random.default_rng(1).permutation(12)
    again = ImageExamples(every.labels[::-1].copy(), every.values[order], np.argsort(order))
    assert again.digest == every.digest
    assert every.subset(order).digest != every.digest
    other = every.values.copy()
    other[3, 0, 0, 0] += 1e-7
    assert ImageExamples(every.labels, other, every.rows).digest != every.digest
    flat = ImageExamples(every.labels, every.values.reshape(12, 1, 16, 4), every.rows)
    assert flat.digest != every.digest
    assert concatenate([every.subset(order[:5]), every]).digest == (
        every.subset(np.concatenate([order[:5], np.arange(12)])).digest
    )


@pytest.mark.parametrize("left", [False, True])
def test_a_batch_may_be_wider_than_it_must_be(left: bool) -> None:
    examples, index = texts(20, pad_left=left), np.array([3, 0, 7])
    narrow, width = as_tensors(examples.batch(index)), examples.width(index)
    assert width == examples.lengths[index].max() == narrow["input_ids"].shape[1]
    wide = as_tensors(examples.batch(index, width + 5))
    kept, padding = (slice(5, None), slice(5)) if left else (slice(width), slice(width, None))
    for name, values in narrow.items():
        assert wide[name].shape == (3, width + 5)
        assert wide[name][:, kept].equal(values)
        assert (wide[name][:, padding] == 0).all()


def test_a_width_of_no_rows_or_of_images_is_nothing() -> None:
    assert texts(4).width(np.empty(0, np.int64)) == 0
    assert digits(4).width(np.arange(4)) == 0
    assert digits(4).lengths.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("examples", [texts(50), digits(50)], ids=["texts", "images"])
def test_what_a_part_shares_counts_for_it_too(examples: Examples) -> None:
    part = examples.subset(np.arange(2))
    assert part.nbytes < examples.nbytes < 2 * part.nbytes + 10_000
    assert part.nbytes > 0
