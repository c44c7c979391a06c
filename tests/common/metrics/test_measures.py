"""Ranking, calibration and groups from counts: scikit-learn's figures within the stated bounds."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from fedgraft.common.errors import MessageError
from fedgraft.common.metrics.measures import CALIBRATION_BINS, LabelMeasures
from fedgraft.common.metrics.tally import Tally

Logits = NDArray[np.float32]
Labels = NDArray[np.int64]


@st.composite
def answers(draw: st.DrawFn, classes: int = 3) -> tuple[Logits, Labels]:
    """Logits and true classes; sharp ones, flat ones, and ties."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    count = draw(st.integers(1, 60))
    true = rng.integers(0, draw(st.integers(1, classes)), count)
    logits = rng.normal(size=(count, classes)) * draw(st.sampled_from([0.0, 0.3, 2.0, 30.0]))
    logits[np.arange(count), true] += draw(st.sampled_from([0.0, 1.0, 5.0]))
    return np.round(logits, draw(st.integers(0, 4))).astype(np.float32), true


def counted(
    measures: LabelMeasures, logits: Logits, true: Labels, groups: Labels | None = None
) -> Tally:
    predicted = logits.argmax(1)
    more = measures.count_scores(logits, true)
    if groups is not None:
        more = more + measures.count_groups(groups, predicted == true)
    return Tally.of(0.0, true, predicted, measures.classes, more)


def shares(logits: Logits) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    result: NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
    return result


def exact_calibration_error(logits: Logits, true: Labels) -> float:
    """As defined by Naeini et al., one example at a time."""
    found = shares(logits)
    confidence, right = found.max(1), logits.argmax(1) == true
    edges = np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS
    which = np.searchsorted(edges, confidence, side="right")
    return float(
        sum(
            abs(right[which == one].sum() - confidence[which == one].sum())
            for one in range(CALIBRATION_BINS)
        )
    ) / len(true)


@settings(deadline=None)
@given(answers(), st.sampled_from([10, 50, 1000]))
def test_auroc_is_that_of_scikit_learn_within_the_stated_error(
    pair: tuple[Logits, Labels], bins: int
) -> None:
    logits, true = pair
    measures = LabelMeasures(3, bins)
    found = measures.summary(counted(measures, logits, true))
    classes = [one for one in range(3) if 0 < (true == one).sum() < len(true)]
    if not classes:
        assert found["auroc"] is None and found["auroc_error"] is None
        return
    areas = [roc_auc_score(true == one, shares(logits)[:, one]) for one in classes]
    assert abs(found["auroc"] - np.mean(areas)) <= found["auroc_error"] + 1e-9
    assert 0 <= found["auroc_error"] <= 0.5


def test_with_all_classes_it_is_the_macro_average_of_one_against_the_rest() -> None:
    rng = np.random.default_rng(5)
    true = rng.integers(0, 4, 3000)
    logits = rng.normal(size=(3000, 4)).astype(np.float32)
    logits[np.arange(3000), true] += 1.5
    expected = roc_auc_score(true, shares(logits), multi_class="ovr", average="macro")
    errors = []
    for bins in (20, 100, 500):
        measures = LabelMeasures(4, bins)
        found = measures.summary(counted(measures, logits, true))
        assert abs(found["auroc"] - expected) <= found["auroc_error"]
        errors.append(found["auroc_error"])
    assert errors[0] > errors[1] > errors[2]  # finer bins are worth it
    assert errors[1] < 0.02 and errors[2] < 0.004


HEADS = [(0, 0, 1, 1, 1), (1, 0, 1, 0), (0, 1, 1, 0, 2, 2)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("signal", [0.0, 1.5])
def test_with_several_heads_auroc_is_within_each_head(
    heads: tuple[int, ...], signal: float
) -> None:
    """A row of another head says nothing of a class: noise has 0.5, as scikit-learn says."""
    rng, of = np.random.default_rng(3), np.array(heads)
    true = rng.integers(0, len(heads), 6000)
    logits = rng.normal(size=(6000, len(heads))).astype(np.float32)
    logits[np.arange(6000), true] += signal
    mine = of[true][:, None] == of
    logits = np.where(mine, logits, -np.inf)
    areas = []
    for head in set(heads):
        rows, classes = of[true] == head, np.flatnonzero(of == head)
        areas += [roc_auc_score(true[rows] == c, shares(logits)[rows, c]) for c in classes]
    measures = LabelMeasures(len(heads), 500, heads=heads)
    tally = counted(measures, logits, true)
    found = measures.summary(tally)
    assert abs(found["auroc"] - np.mean(areas)) <= found["auroc_error"] + 1e-9
    assert abs(found["auroc"] - 0.5) < 0.02 if not signal else found["auroc"] > 0.8
    assert measures.fits(tally) and not LabelMeasures(len(heads), 500).fits(tally)


def test_ranks_among_rare_probabilities_are_told_apart() -> None:
    """Of 150 classes every score is near 0: bins of equal width would see one value."""
    rng = np.random.default_rng(1)
    true = rng.integers(0, 150, 2000)
    logits = rng.normal(size=(2000, 150)).astype(np.float32)
    logits[np.arange(2000), true] += 1.0
    measures = LabelMeasures(150, 100)
    found = measures.summary(counted(measures, logits, true))
    expected = roc_auc_score(true, shares(logits), multi_class="ovr", average="macro")
    assert abs(found["auroc"] - expected) <= found["auroc_error"] < 0.05


@settings(deadline=None)
@given(answers(), st.sampled_from([10, 100, 1000]))
def test_the_calibration_error_is_the_exact_one_within_half_a_bin(
    pair: tuple[Logits, Labels], bins: int
) -> None:
    measures = LabelMeasures(3, bins)
    found = measures.summary(counted(measures, *pair))
    assert found["calibration_error_bound"] == 0.5 / bins
    off = abs(found["calibration_error"] - exact_calibration_error(*pair))
    assert off <= found["calibration_error_bound"] + 1e-9


def test_a_model_that_is_sure_and_half_right_is_off_by_a_half() -> None:
    logits = np.tile(np.array([[40.0, 0.0]], np.float32), (100, 1))
    measures = LabelMeasures(2, 1000)
    found = measures.summary(counted(measures, logits, np.arange(100) % 2))
    assert found["calibration_error"] == pytest.approx(0.5, abs=0.0006)


@settings(deadline=None)
@given(answers(), answers())
def test_counts_of_two_sites_add_up_to_those_of_all_examples(
    one: tuple[Logits, Labels], other: tuple[Logits, Labels]
) -> None:
    measures = LabelMeasures(3, 20, ("f", "m"))
    rng = np.random.default_rng(0)
    groups = [rng.integers(-1, 2, len(true)) for _, true in (one, other)]
    merged = counted(measures, *one, groups[0]) + counted(measures, *other, groups[1])
    logits = np.concatenate([one[0], other[0]])
    pooled = counted(measures, logits, np.concatenate([one[1], other[1]]), np.concatenate(groups))
    assert np.array_equal(merged.more, pooled.more)
    assert measures.summary(merged) == measures.summary(pooled)
    back = Tally.from_vector(merged.to_vector(), measures)
    assert np.array_equal(back.more, merged.more)


def test_groups_are_told_apart_and_small_ones_are_not_shown() -> None:
    measures = LabelMeasures(2, 0, ("f", "m", "x"), fewest=4)
    groups = np.array([0] * 10 + [1] * 5 + [2] * 3 + [-1] * 7)
    correct = np.array([True] * 9 + [False] + [True, False, False, False, False] + [True] * 10)
    true = np.zeros(25, np.int64)
    more = measures.count_groups(groups, correct)
    found = measures.summary(Tally.of(0.0, true, (~correct).astype(np.int64), 2, more))
    assert found == {
        "groups": {
            "f": {"examples": 10, "accuracy": 0.9},
            "m": {"examples": 5, "accuracy": 0.2},
            "x": None,
        },
        "accuracy_gap": pytest.approx(0.7),
    }
    assert measures.without_few(more).tolist() == [9, 1, 1, 4, 0, 0]
    assert more.tolist() == [9, 1, 1, 4, 3, 0]


def test_a_gap_needs_two_groups_that_are_shown() -> None:
    measures = LabelMeasures(2, 0, ("f", "m"), fewest=4)
    more = measures.count_groups(np.zeros(9, np.int64), np.ones(9, np.bool_))
    found = measures.summary(Tally.of(0.0, np.zeros(9, int), np.zeros(9, int), 2, more))
    assert found["accuracy_gap"] is None


def test_where_nothing_is_asked_nothing_is_counted_or_said() -> None:
    measures = LabelMeasures(3)
    tally = counted(measures, np.eye(3, dtype=np.float32), np.arange(3))
    assert measures.size == 0 and len(tally.more) == 0 and measures.summary(tally) == {}
    assert tally.to_vector().shape == (10,)


def test_without_examples_there_are_no_figures() -> None:
    measures = LabelMeasures(3, 10, ("f",))
    found = measures.summary(Tally.empty(measures))
    assert found["auroc"] is found["calibration_error"] is None
    assert found["groups"] == {"f": None} and found["accuracy_gap"] is None


@pytest.mark.parametrize("at", ["scores", "sure", "groups", "negative"])
def test_counts_that_contradict_the_confusion_matrix_are_refused(at: str) -> None:
    measures = LabelMeasures(2, 10, ("f",))
    logits = np.array([[1, 0], [0, 1], [2, 0]], np.float32)
    vector = counted(measures, logits, np.array([0, 1, 1]), np.zeros(3, np.int64)).to_vector()
    Tally.from_vector(vector, measures)
    place = {"scores": 5, "sure": 5 + 40, "groups": 5 + 60, "negative": 5 + 60}[at]
    vector[place] += -10 if at == "negative" else 1
    with pytest.raises(MessageError):
        Tally.from_vector(vector, measures)


def test_extreme_logits_are_counted_like_any() -> None:
    measures = LabelMeasures(2, 10)
    logits = np.array([[1e30, -1e30], [-1e30, 1e30], [0, 0]], np.float32)
    tally = counted(measures, logits, np.array([0, 1, 0]))
    assert measures.fits(tally) and math.isfinite(measures.summary(tally)["auroc"])
