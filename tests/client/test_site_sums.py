"""What a site adds: sums that do not depend on how examples are cut up, shots that nest."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.client.selection.features import Features
from fedgraft.client.selection.transferability import (
    SiteSums,
    draw_shots,
    nearest,
    site_answers,
    site_sums,
    unit,
)
from fedgraft.common.seeds import numpy_generator

CLASSES, SOURCES, WIDTH = 4, 3, 5


def block(n: int, seed: int = 0, sources: int = SOURCES) -> Features:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, n)
    values = (np.eye(CLASSES, WIDTH)[labels] * 2 + draw.normal(0, 0.5, (n, WIDTH))).astype("f4")
    chances = draw.dirichlet(np.ones(SOURCES), n).astype("f4")[:, :sources]
    return Features(labels, values, chances)


def cut(whole: Features, size: int) -> Iterator[Features]:
    for at in range(0, len(whole.labels), size):
        part = slice(at, at + size)
        yield Features(whole.labels[part], whole.values[part], whole.probabilities[part])


def sums(whole: Features, size: int, shots: tuple[int, ...] = (1, 5)) -> SiteSums:
    draw = np.random.default_rng(7)
    found = site_sums(cut(whole, size), whole.labels, CLASSES, shots=shots, generator=draw)
    assert found is not None
    return found


@pytest.mark.parametrize("size", [1, 7, 60])
def test_blocks_do_not_matter(size: int) -> None:
    whole = block(60)
    one, many = sums(whole, 1000), sums(whole, size)
    for name in ("soft", "hard"):
        np.testing.assert_allclose(getattr(one, name), getattr(many, name))
    np.testing.assert_allclose(one.moments.second, many.moments.second)
    for k in (1, 5):
        np.testing.assert_allclose(one.shots[k], many.shots[k])


def test_sums_are_what_they_are_called() -> None:
    whole = block(60)
    found = sums(whole, 60)
    assert found.hard.sum() == 60
    assert found.soft.sum() == pytest.approx(60, abs=1e-4)
    np.testing.assert_array_equal(found.hard.sum(1), np.bincount(whole.labels, minlength=CLASSES))
    turns = draw_shots(whole.labels, np.random.default_rng(7))
    for k in (1, 5):
        for label in range(CLASSES):
            mine = whole.values[(whole.labels == label) & (turns < k)]
            np.testing.assert_allclose(found.shots[k][label], unit(mine).sum(0), atol=1e-9)


def test_without_a_source_head_there_is_nothing_to_count() -> None:
    found = sums(block(10, sources=0), 4)
    assert found.soft.shape == found.hard.shape == (CLASSES, 0)


def test_a_site_without_examples_adds_nothing() -> None:
    draw = np.random.default_rng(0)
    none = np.empty(0, np.int64)
    assert site_sums(iter(()), none, CLASSES, shots=(1,), generator=draw) is None


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 99))
def test_shots_are_so_many_of_each_class_and_nest(labels: list[int], seed: int) -> None:
    array = np.array(labels)
    turns = draw_shots(array, numpy_generator(seed, "shots", "site-01"))
    again = draw_shots(array, numpy_generator(seed, "shots", "site-01"))
    np.testing.assert_array_equal(turns, again)
    for label, count in zip(*np.unique(array, return_counts=True), strict=True):
        assert sorted(turns[array == label]) == list(range(count))  # k shots: those below k


def test_sites_and_runs_draw_their_own() -> None:
    labels = np.zeros(50, np.int64)
    drawn = {
        tuple(draw_shots(labels, numpy_generator(seed, "shots", site)))
        for seed in (0, 1)
        for site in ("a", "b")
    }
    assert len(drawn) == 4


def test_the_nearest_prototype_is_by_angle_and_never_an_unknown_class() -> None:
    prototypes = np.zeros((CLASSES, WIDTH))
    prototypes[1, 0], prototypes[3, 1] = 100, 0.1
    found = nearest(unit(np.array([[1.0, 0.2, 0, 0, 0], [1, 1.1, 0, 0, 0]])), prototypes)
    assert found.tolist() == [1, 3]
    assert nearest(np.ones((2, WIDTH)), np.zeros((CLASSES, WIDTH))).tolist() == [-1, -1]


def test_prototypes_of_more_shots_know_more_and_a_known_head_answers_zero_shots() -> None:
    train, test = block(400), block(300, seed=5)
    found = sums(train, 100, shots=(0, 1, 20))
    assert sorted(found.shots) == [1, 20]
    given_ = np.full((CLASSES, SOURCES), 1 / CLASSES)
    answers = site_answers(cut(train, 50), cut(test, 50), given_, found.shots, knows_labels=True)
    assert answers.tested == 300
    assert answers.right[20] > answers.right[1] > 75
    assert answers.right[0] == (test.probabilities.argmax(1) == test.labels).sum()
    assert answers.leep == pytest.approx(400 * np.log(1 / CLASSES), rel=1e-5)
