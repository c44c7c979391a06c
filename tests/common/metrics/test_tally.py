"""A tally agrees with scikit-learn, adds up over sites, and refuses vectors that are none."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
)

from fedgraft.common.errors import MessageError
from fedgraft.common.metrics.measures import LabelMeasures
from fedgraft.common.metrics.tally import Tally

Labels = NDArray[np.int64]


@st.composite
def predictions(draw: st.DrawFn, classes: int = 4) -> tuple[Labels, Labels]:
    """True and predicted classes, some of which may not occur."""
    labels = st.integers(0, classes - 1)
    pairs = draw(st.lists(st.tuples(labels, labels), max_size=30))
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


losses = st.floats(0, 1e6)


@given(predictions())
def test_scores_are_those_of_scikit_learn(pair: tuple[Labels, Labels]) -> None:
    true, predicted = pair
    tally = Tally.of(2.0, true, predicted, 4)
    assert tally.examples == len(true)
    if not len(true):
        assert set(tally.summary().values()) == {0.0, 2.0} and tally.mean_loss == 2.0
        return
    expected = f1_score(true, predicted, average="macro", zero_division=0)
    assert math.isclose(tally.macro_f1, expected)
    weighted = f1_score(true, predicted, average="weighted", zero_division=0)
    assert math.isclose(tally.weighted_f1, weighted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a predicted class is never true
        assert math.isclose(tally.balanced_accuracy, balanced_accuracy_score(true, predicted))
    assert math.isclose(tally.accuracy, accuracy_score(true, predicted))
    assert math.isclose(tally.mean_loss, 2.0 / len(true))
    assert tally.correct == accuracy_score(true, predicted, normalize=False)
    matrix = confusion_matrix(true, predicted, labels=range(4))
    assert np.array_equal(tally.confusion, matrix)


def test_rows_are_true_classes_and_columns_predicted_ones() -> None:
    tally = Tally.of(0.0, np.array([0, 0, 1]), np.array([1, 1, 1]), 2)
    assert tally.confusion.tolist() == [[0, 2], [0, 1]]


def test_a_class_that_is_neither_true_nor_predicted_does_not_lower_macro_f1() -> None:
    true = np.array([0, 0, 1, 1])
    assert Tally.of(0.0, true, true, 10).macro_f1 == 1.0


def test_a_class_that_is_predicted_and_never_true_has_f1_0() -> None:
    tally = Tally.of(0.0, np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]), 4)
    assert math.isclose(tally.macro_f1, (1 + 2 / 3 + 0) / 3)
    true = np.array([0] * 90 + [1] * 10)
    predicted = np.array([0] * 60 + [2] * 30 + [1] * 10)
    assert math.isclose(Tally.of(0.0, true, predicted, 3).macro_f1, 0.6)


def test_summary_names_what_the_reports_show() -> None:
    tally = Tally.of(3.0, np.array([0, 1]), np.array([0, 0]), 2)
    third = pytest.approx(1 / 3)
    assert tally.summary() == {
        "accuracy": 0.5,
        "macro_f1": third,
        "weighted_f1": third,
        "balanced_accuracy": 0.5,
        "loss": 1.5,
    }


@given(predictions(), predictions(), losses, losses)
def test_tallies_of_two_sites_add_up_to_the_tally_of_all_their_examples(
    one: tuple[Labels, Labels], other: tuple[Labels, Labels], loss: float, another: float
) -> None:
    merged = Tally.of(loss, *one, 4) + Tally.of(another, *other, 4)
    true, predicted = (np.concatenate(pair) for pair in zip(one, other, strict=True))
    pooled = Tally.of(loss + another, true, predicted, 4)
    assert merged.loss == pooled.loss
    assert np.array_equal(merged.confusion, pooled.confusion)
    assert merged.summary() == pooled.summary()


@given(predictions(), losses)
def test_the_empty_tally_adds_nothing(pair: tuple[Labels, Labels], loss: float) -> None:
    tally = Tally.of(loss, *pair, 4)
    merged = Tally.empty(LabelMeasures(4)) + tally
    assert merged.loss == loss
    assert np.array_equal(merged.confusion, tally.confusion)


def test_adding_leaves_both_tallies_as_they_were() -> None:
    one = Tally.of(1.0, np.array([0]), np.array([0]), 2)
    assert (one + one).examples == 2
    assert one.examples == 1


@given(predictions(), losses)
def test_a_vector_brings_the_tally_back(pair: tuple[Labels, Labels], loss: float) -> None:
    tally = Tally.of(loss, *pair, 4)
    vector = tally.to_vector()
    assert vector.dtype == np.float64
    assert vector.shape == (17,)
    back = Tally.from_vector(vector, LabelMeasures(4))
    assert back.loss == loss
    assert back.confusion.dtype == np.int64
    assert np.array_equal(back.confusion, tally.confusion)


def test_the_vector_is_the_loss_and_then_the_rows() -> None:
    vector = Tally.of(0.25, np.array([0, 1, 1]), np.array([1, 0, 0]), 2).to_vector()
    assert vector.tolist() == [0.25, 0, 1, 2, 0]


HOSTILE: dict[str, NDArray[np.generic]] = {
    "short": np.zeros(4),
    "long": np.zeros(6),
    "empty": np.zeros(0),
    "no axis": np.array(0.0),
    "matrix": np.zeros((1, 5)),
    "nan loss": np.array([math.nan, 1, 0, 0, 1]),
    "infinite loss": np.array([math.inf, 1, 0, 0, 1]),
    "nan count": np.array([0, math.nan, 0, 0, 1]),
    "infinite count": np.array([0, 1, 0, math.inf, 1]),
    "half a count": np.array([0, 0.5, 0, 0, 1]),
    "negative count": np.array([0, 1, -1, 0, 1]),
    "count beyond int64": np.array([0, 1e300, 0, 0, 1]),
    "count just beyond int64": np.array([0, 2.0**63, 0, 0, 1]),
    "text": np.array(["0"] * 5),
    "bytes": np.array([b"0"] * 5),
    "objects": np.array([0] * 5, object),
    "complex": np.array([0, 1j, 0, 0, 1]),
    "structured": np.zeros(5, [("a", "f8")]),
    "dates": np.zeros(5, "M8[s]"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_vector_is_refused(name: str) -> None:
    with warnings.catch_warnings(), pytest.raises(MessageError):
        warnings.simplefilter("ignore")
        Tally.from_vector(HOSTILE[name], LabelMeasures(2))  # type: ignore[arg-type]
