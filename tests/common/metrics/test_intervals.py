"""Known answers from the literature for intervals of shares, of macro F1 and of differences."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import f1_score
from support.matrix import tries

from fedgraft.common.metrics.intervals import (
    macro_f1_difference,
    macro_f1_interval,
    wilson_interval,
)
from fedgraft.common.metrics.tally import Tally

# Wilson


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [  # Newcombe 1998, "Two-sided confidence intervals for the single proportion", method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_values(
    correct: int, total: int, low: float, high: float
) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_scipy_and_holds_the_share(pair: tuple[int, int]) -> None:
    correct, total = pair
    low, high = wilson_interval(correct, total)
    expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= correct / total <= high <= 1
    mirrored = wilson_interval(total - correct, total)
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-9)


def test_wilson_without_examples_knows_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("correct", "total"), [(-1, 3), (4, 3), (0, -1)])
def test_wilson_refuses_impossible_counts(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="correct"):
        wilson_interval(correct, total)


# Macro F1


def matrices(largest: int = 30) -> st.SearchStrategy[NDArray[np.int64]]:
    """Square confusion matrices of 1 to 5 classes."""
    return st.integers(1, 5).flatmap(
        lambda c: st.lists(st.integers(0, largest), min_size=c * c, max_size=c * c).map(
            lambda cells: np.array(cells).reshape(c, c)
        )
    )


@given(matrices())
@settings(max_examples=tries(100), deadline=None)
def test_macro_f1_agrees_with_resampling_one_by_one(confusion: NDArray[np.int64]) -> None:
    low, high = macro_f1_interval(confusion, np.random.default_rng(7), draws=50)
    assert 0 <= low <= high <= 1
    if confusion.sum() == 0:
        assert (low, high) == (0.0, 1.0)
        return
    true, predicted = np.nonzero(confusion)
    share = confusion[true, predicted] / confusion.sum()
    draws = np.random.default_rng(7).multinomial(confusion.sum(), share, size=50)
    scores = []
    for draw in draws:
        again = np.zeros_like(confusion)
        again[true, predicted] = draw
        scores.append(Tally(0.0, again).macro_f1)
    assert (low, high) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])))


def slow_interval(confusion: NDArray[np.int64], seed: int) -> tuple[float, float]:
    """All draws at once, sums over whole columns of classes."""
    true, predicted = np.nonzero(confusion)
    total = int(confusion.sum())
    shares = confusion[true, predicted] / total
    samples = np.random.default_rng(seed).multinomial(total, shares, size=500)
    dense = np.zeros((500, *confusion.shape), np.int64)
    dense[:, true, predicted] = samples
    support, guesses = dense.sum(2), dense.sum(1)
    f1 = 2 * np.diagonal(dense, axis1=1, axis2=2) / np.maximum(support + guesses, 1)
    scores = f1.sum(axis=1) / (support + guesses > 0).sum(axis=1)
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("at_once", [1 << 20, 3000, 7])
@pytest.mark.parametrize(("classes", "examples"), [(2, 20), (6, 20), (6, 3000), (40, 60)])
def test_a_quicker_macro_f1_interval_is_the_same_to_the_last_bit(
    classes: int, examples: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedgraft.common.metrics.intervals.DRAWN_AT_ONCE", at_once)
    draw = np.random.default_rng(classes * examples)
    for seed in range(5):
        true = draw.integers(0, classes, examples)
        predicted = np.where(draw.random(examples) < 0.7, true, draw.integers(0, classes, examples))
        confusion = Tally.of(0.0, true, predicted, classes).confusion
        found = macro_f1_interval(confusion, np.random.default_rng(seed))
        assert found == slow_interval(confusion, seed)


def test_macro_f1_interval_holds_the_value_and_narrows_with_examples() -> None:
    small = np.array([[40, 6, 4], [5, 30, 5], [2, 8, 20]])
    generator = np.random.default_rng(0)
    low, high = macro_f1_interval(small, generator)
    value = Tally(0.0, small).macro_f1
    assert low < value < high
    low10, high10 = macro_f1_interval(10 * small, generator)
    assert low10 < value < high10
    assert (high - low) / (high10 - low10) == pytest.approx(10**0.5, rel=0.2)


def test_macro_f1_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    share = np.array([[0.30, 0.05, 0.02], [0.04, 0.25, 0.04], [0.02, 0.06, 0.22]])
    truth = Tally(0.0, np.round(100 * share).astype(np.int64)).macro_f1
    inside = 0
    for _ in range(300):
        confusion = generator.multinomial(400, share.ravel()).reshape(3, 3)
        low, high = macro_f1_interval(confusion, generator, draws=200)
        inside += low <= truth <= high
    assert 0.90 <= inside / 300 <= 0.99


def test_classes_without_true_examples_do_not_count() -> None:
    assert macro_f1_interval(np.diag([5, 5, 0]), np.random.default_rng(0)) == (1.0, 1.0)
    # Never right about the only class that occurs: its F1 is 0, the other class is not asked.
    assert macro_f1_interval(np.array([[0, 9], [0, 0]]), np.random.default_rng(0)) == (0.0, 0.0)


def test_the_same_generator_gives_the_same_interval() -> None:
    confusion = np.array([[9, 1], [3, 7]])
    first = macro_f1_interval(confusion, np.random.default_rng(5))
    assert first == macro_f1_interval(confusion, np.random.default_rng(5))


def test_many_classes_stay_quick() -> None:
    confusion = np.diag(np.full(1000, 40)) + np.eye(1000, k=1, dtype=np.int64)
    started = time.perf_counter()
    macro_f1_interval(confusion, np.random.default_rng(0))
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    "confusion",
    [np.ones((2, 3), int), np.ones(4, int), np.ones((2, 2)), np.array([[1, -1], [0, 2]])],
)
def test_what_is_no_confusion_matrix_is_refused(confusion: NDArray[np.int64]) -> None:
    with pytest.raises(ValueError, match="confusion"):
        macro_f1_interval(confusion, np.random.default_rng(0))


def test_no_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="draw"):
        macro_f1_interval(np.eye(2, dtype=int), np.random.default_rng(0), draws=0)


# Macro F1 of two models on the same examples


def test_the_difference_in_macro_f1_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    true = rng.integers(0, 4, 300)
    ours = np.where(rng.random(300) < 0.8, true, rng.integers(0, 4, 300))
    others = np.where(rng.random(300) < 0.5, true, rng.integers(0, 4, 300))
    gap, (low, high) = macro_f1_difference(true, ours, others, generator=rng)
    wanted = f1_score(true, ours, average="macro") - f1_score(true, others, average="macro")
    assert gap == pytest.approx(wanted)
    assert 0 < low < gap < high < 0.5


def test_a_paired_interval_is_narrower_than_two_that_know_nothing_of_each_other() -> None:
    rng = np.random.default_rng(3)
    true = rng.integers(0, 3, 400)
    ours = np.where(rng.random(400) < 0.7, true, (true + 1) % 3)
    others = np.where(rng.random(400) < 0.02, (ours + 1) % 3, ours)  # all but the same answers
    _, (low, high) = macro_f1_difference(true, ours, others, generator=rng)
    shuffled = rng.permutation(400)  # the same two models on examples of their own
    _, (wide_low, wide_high) = macro_f1_difference(
        true, ours, np.where(others == true, true, (true + 1) % 3)[shuffled], generator=rng
    )
    assert high - low < 0.5 * (wide_high - wide_low)


def macro_f1(true: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Macro F1 in a twentieth of the time that scikit-learn takes."""
    there = np.bincount(true, minlength=3)
    said = np.bincount(predicted, minlength=3)
    right = np.bincount(true[true == predicted], minlength=3)
    return float(np.mean((2 * right / np.maximum(there + said, 1))[there + said > 0]))


def test_macro_f1_is_scikit_learns() -> None:
    rng = np.random.default_rng(9)
    for labels in (2, 3):
        true, predicted = rng.integers(0, labels, 40), rng.integers(0, 3, 40)
        known = f1_score(true, predicted, average="macro")
        assert macro_f1(true, predicted) == pytest.approx(known, abs=1e-12)


def test_the_paired_bootstrap_is_redrawing_examples() -> None:
    rng = np.random.default_rng(8)
    true = rng.integers(0, 3, 60)
    ours, others = (np.where(rng.random(60) < p, true, rng.integers(0, 3, 60)) for p in (0.9, 0.5))
    _, ends = macro_f1_difference(true, ours, others, generator=rng, draws=4000)
    gaps = []
    for _ in range(1500):
        rows = rng.integers(0, 60, 60)
        one, other = (macro_f1(true[rows], predicted[rows]) for predicted in (ours, others))
        gaps.append(one - other)
    assert ends == pytest.approx(np.quantile(gaps, [0.025, 0.975]), abs=0.02)


def test_equal_models_differ_by_nothing() -> None:
    true = np.arange(30) % 3
    gap, ends = macro_f1_difference(true, true, true, generator=np.random.default_rng(0))
    assert (gap, ends) == (0.0, (0.0, 0.0))
    nothing = np.zeros(0, np.int64)
    told = macro_f1_difference(nothing, nothing, nothing, generator=np.random.default_rng(0))
    assert told == (0.0, (-1.0, 1.0))


def test_vectors_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        macro_f1_difference(
            np.zeros(3, int), np.zeros(3, int), np.zeros(4, int), generator=np.random.default_rng(0)
        )
    with pytest.raises(ValueError, match="one draw"):
        macro_f1_difference(*np.zeros((3, 4), int), generator=np.random.default_rng(0), draws=0)
