"""What a verdict on two models says: published values, and what must hold for any pair."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom
from support.matrix import tries

from fedgraft.common.metrics.label_evaluation import verdict

Bools = NDArray[np.bool_]
COUNTS = st.integers(0, 40)


def paired(both: int, only_federated: int, only_local: int, neither: int) -> tuple[Bools, Bools]:
    """Two boolean vectors with these cells."""
    cells = (both, only_federated, only_local, neither)
    federated = np.repeat([True, True, False, False], cells)
    local = np.repeat([True, False, True, False], cells)
    return federated, local


def test_interval_gives_the_published_values() -> None:
    # Newcombe 1998 (paired data), method 10, cells 36, 12, 2, 0.
    found = verdict(*paired(36, 12, 2, 0), name="s")
    assert found.difference == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.0569, 0.3404), abs=5e-5)
    # Airway hyper-responsiveness (Bentur 2009) in Fagerland, Lydersen, Laake 2014.
    found = verdict(*paired(1, 1, 7, 12), name="s")
    assert found.interval == pytest.approx((-0.507, -0.026), abs=5e-4)
    assert found.p_value == pytest.approx(0.0703, abs=5e-5)


@given(COUNTS, COUNTS, COUNTS, COUNTS)
@settings(max_examples=tries(200), deadline=None)
def test_a_verdict_is_consistent_and_antisymmetric(
    both: int, only_federated: int, only_local: int, neither: int
) -> None:
    federated, local = paired(both, only_federated, only_local, neither)
    found = verdict(federated, local, name="s")
    assert found.interval is not None
    low, high = found.interval
    assert -1 <= low <= found.difference <= high <= 1
    assert 0 < found.p_value <= 1
    expected = 2 * binom.cdf(min(only_federated, only_local), only_federated + only_local, 0.5)
    assert found.p_value == pytest.approx(min(1.0, expected), rel=1e-9)
    if found.outcome == "helped":
        assert low > 0 and found.p_value < 0.05
    if found.outcome == "hurt":
        assert high < 0 and found.p_value < 0.05

    swapped = verdict(local, federated, name="s")
    assert swapped.difference == -found.difference
    assert swapped.interval == pytest.approx((-high, -low), abs=1e-12)
    opposite = {"helped": "hurt", "hurt": "helped"}
    assert swapped.outcome == opposite.get(found.outcome, found.outcome)


def test_the_order_of_examples_does_not_matter() -> None:
    federated, local = paired(30, 12, 3, 5)
    order = np.random.default_rng(0).permutation(len(local))
    assert verdict(federated[order], local[order], name="s") == verdict(federated, local, name="s")


def test_a_clear_gain_is_told_in_numbers() -> None:
    found = verdict(*paired(380, 70, 12, 38), name="site-03")
    assert found.outcome == "helped"
    assert found.sentence == (
        "At site-03 the federated model is better than the site's own: 90.0 % right instead of "
        "78.4 % (difference +11.6 points, 95 % interval +8.2 to +15.1)."
    )


def test_a_clear_loss_is_told_as_plainly() -> None:
    found = verdict(*paired(380, 12, 70, 38), name="site-03")
    assert found.outcome == "hurt"
    assert found.sentence.startswith("At site-03 the federated model is worse than the site's own")
    assert "difference -11.6 points, 95 % interval -15.1 to -8.2" in found.sentence


def test_too_few_examples_are_said_to_be_too_few() -> None:
    found = verdict(*paired(4, 2, 1, 1), name="site-03")
    assert found.outcome == "unclear"
    assert "8 test examples cannot tell which is better" in found.sentence
    assert "p = 1.00" in found.sentence


def test_one_example_is_singular() -> None:
    found = verdict(np.array([True]), np.array([False]), name="s")
    assert found.outcome == "unclear"
    assert "and 1 test example cannot tell" in found.sentence


def test_equal_models_have_no_sign_and_no_evidence() -> None:
    found = verdict(*paired(50, 0, 0, 10), name="s")
    assert (found.outcome, found.difference, found.p_value) == ("unclear", 0.0, 1.0)
    assert "difference 0.0 points" in found.sentence


def test_a_significant_interval_alone_is_no_verdict() -> None:
    # Newcombe's interval excludes 0 here, the exact test (p = 0.0703) does not.
    found = verdict(*paired(1, 1, 7, 12), name="s")
    assert found.interval is not None and found.interval[1] < 0
    assert found.outcome == "unclear"
    assert "p = 0.07" in found.sentence


def test_no_test_examples_is_unknown() -> None:
    found = verdict(np.zeros(0, bool), np.zeros(0, bool), name="site-03")
    assert found.outcome == "unknown"
    assert found.interval == (-1.0, 1.0)
    assert "site-03" in found.sentence


@pytest.mark.parametrize(
    ("federated", "local"),
    [
        (np.ones(3, bool), np.ones(4, bool)),
        (np.ones((2, 2), bool), np.ones((2, 2), bool)),
        (np.ones(3, int), np.ones(3, bool)),
    ],
)
def test_vectors_that_are_no_pair_are_refused(federated: Bools, local: Bools) -> None:
    with pytest.raises(ValueError, match="vectors"):
        verdict(federated, local, name="s")


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (90, 40, "At A the federated model is better than the backbone untouched: 90.0 % right"),
        (40, 90, "This is negative transfer."),
        (50, 50, "Against the backbone untouched (zero-shot, 50.0 %) 100 test examples cannot"),
    ],
)
def test_the_backbone_untouched_is_told_in_its_own_words(ours: int, theirs: int, said: str) -> None:
    right = [np.arange(100) < count for count in (ours, theirs)]
    judged = verdict(right[0], right[1], name="A", rival="zero_shot")
    assert said in judged.sentence and "on its own" not in judged.sentence
    alone = verdict(right[0], right[1], name="A")
    assert (alone.outcome, alone.interval) == (judged.outcome, judged.interval)
