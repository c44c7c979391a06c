"""Verdicts on texts: against scipy, by hand, and at their edges."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedgraft.common.metrics.part_evaluation import (
    TOKENS,
    PartMeasures,
    part_intervals,
    text_verdict,
)
from fedgraft.common.metrics.verdict import Verdict

RNG = np.random.default_rng


def losses(blocks: int, seed: int, gap: float = 0.0) -> tuple[Any, Any, Any]:
    """Federated and other losses of texts, the federated ``gap`` nats a token more."""
    draw = RNG(seed)
    counted = draw.integers(5, 60, blocks)
    other = counted * draw.normal(2.0, 0.3, blocks)
    return other + counted * draw.normal(gap, 0.2, blocks), other, counted


def judged(federated: Any, other: Any, counted: Any, seed: int = 0, **more: Any) -> Verdict:
    return text_verdict(federated, other, counted, name="north", generator=RNG(seed), **more)


@pytest.mark.parametrize("gap", [-0.1, 0.0, 0.05])
def test_the_interval_is_that_of_scipys_bootstrap(gap: float) -> None:
    federated, other, counted = losses(200, 1, gap)
    found = judged(federated, other, counted)
    gaps = federated - other
    assert found.difference == pytest.approx(gaps.sum() / counted.sum())
    known = stats.bootstrap(
        (gaps, counted),
        lambda g, c, axis: g.sum(axis) / c.sum(axis),
        paired=True, vectorized=True, method="percentile", n_resamples=5000, rng=RNG(2),
    ).confidence_interval  # fmt: skip
    assert found.interval == pytest.approx((known.low, known.high), abs=0.004)


@pytest.mark.parametrize("gap", [0.0, 0.02])
def test_the_p_value_is_that_of_scipys_permutation_test(gap: float) -> None:
    federated, other, counted = losses(60, 3, gap)
    known = stats.permutation_test(
        (federated, other), lambda a, b, axis: (a - b).sum(axis),
        permutation_type="samples", vectorized=True, n_resamples=9999, rng=RNG(4),
    )  # fmt: skip
    assert judged(federated, other, counted).p_value == pytest.approx(known.pvalue, abs=0.05)


def test_who_is_better_is_told_by_perplexity() -> None:
    federated, other, counted = losses(200, 5, -0.2)
    ours, theirs = (math.exp(one.sum() / counted.sum()) for one in (federated, other))
    better, worse = judged(federated, other, counted), judged(other, federated, counted)
    assert (better.outcome, worse.outcome) == ("helped", "hurt")
    assert better.difference < 0 < worse.difference
    assert f"perplexity {ours:.2f} instead of {theirs:.2f} (" in better.sentence
    assert better.sentence.startswith("At north the federated model is better than the site's own")
    untouched = judged(other, federated, counted, rival="zero_shot")
    assert "worse than the backbone untouched" in untouched.sentence
    assert untouched.sentence.endswith("This is negative transfer.")
    assert "negative" not in judged(federated, other, counted, rival="zero_shot").sentence


def test_one_surprising_block_is_no_verdict() -> None:
    """All tokens of one block are better, hundreds of them: they are one draw, not hundreds."""
    counted = np.array([500, 20, 20, 20, 20])
    other = 2.0 * counted
    federated = other - np.array([500.0, 0, 0, 0, 0])
    assert judged(federated, other, counted).outcome == "unclear"


@pytest.mark.parametrize("share", [1, 0])
def test_equal_models_are_unclear_and_never_certain(share: int) -> None:
    _, other, counted = losses(50, 6)
    found = judged(other * share, other * share, counted)
    assert (found.outcome, found.difference, found.p_value) == ("unclear", 0.0, 1.0)
    assert found.interval == (0.0, 0.0)


def test_without_tokens_nothing_is_known() -> None:
    for blocks in (0, 3):  # blocks of one token predict none
        nothing = np.zeros(blocks)
        found = judged(nothing, nothing, nothing.astype(np.int64))
        assert (found.outcome, found.interval, found.p_value) == ("unknown", None, 1.0)
        assert "no test tokens" in found.sentence


def test_one_block_has_no_interval() -> None:
    found = judged(np.array([10.0, 0.0]), np.array([30.0, 0.0]), np.array([10, 0]))
    assert (found.outcome, found.interval) == ("unclear", None)
    assert "1 text" in found.sentence
    assert part_intervals(np.array([1.0]), np.array([1]), np.array([2]), RNG(0)) == {}


def test_vectors_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        judged(np.zeros(3), np.zeros(3), np.zeros(2))


@given(
    st.lists(
        st.tuples(st.floats(0, 300), st.floats(0, 300), st.integers(0, 64)), min_size=1, max_size=40
    ),
    st.integers(0, 2**32),
)
def test_test_and_interval_agree_with_what_is_said(
    blocks: list[tuple[float, float, int]], seed: int
) -> None:
    rows = np.array(blocks)
    counted = rows[:, 2].astype(np.int64)
    federated, other = (np.where(counted > 0, rows[:, at], 0.0) for at in (0, 1))
    found = judged(federated, other, counted, seed)
    assert found == judged(federated, other, counted, seed)
    assert 0 < found.p_value <= 1
    if found.outcome in ("helped", "hurt"):
        assert found.interval is not None and found.p_value < 0.05
        assert found.interval[1] < 0 if found.outcome == "helped" else found.interval[0] > 0
    if found.interval is not None:
        assert found.interval[0] <= found.interval[1]


def test_intervals_of_perplexity_and_accuracy_hold_their_figures() -> None:
    found, _, counted = losses(100, 8)
    right = RNG(9).binomial(counted, 0.4)
    intervals = part_intervals(found, right, counted, RNG(0))
    low, high = intervals["perplexity_interval"]
    assert 1 <= low < math.exp(found.sum() / counted.sum()) < high
    low, high = intervals["accuracy_interval"]
    assert 0 <= low < right.sum() / counted.sum() < high <= 1


def test_a_loss_beyond_all_floats_is_still_a_number() -> None:
    high = np.array([1e6, 2e6])
    ends = part_intervals(high, np.array([0, 0]), np.array([1, 1]), RNG(0))["perplexity_interval"]
    assert all(math.isfinite(end) for end in ends)
    assert len(judged(high, high / 2, np.array([1, 1])).sentence) < 250


class Documents:
    """Examples of which nothing but their documents matters: ``per`` blocks of each."""

    def __init__(self, texts: int, per: int) -> None:
        self.documents = np.repeat(np.arange(texts), per)

    def __len__(self) -> int:
        return len(self.documents)


@pytest.mark.parametrize(("texts", "per", "alike"), [(20, 10, 0.2), (10, 40, 0.2), (5, 80, 0.3)])
def test_equal_models_on_few_long_texts_are_rarely_told_apart(
    texts: int, per: int, alike: float
) -> None:
    """Blocks of a text share a part of their difference: as draws of their own, they mislead."""
    measures, examples, told = PartMeasures(128, TOKENS), Documents(texts, per), 0
    for seed in range(100):
        draw = RNG(seed)
        shared = np.repeat(draw.normal(0, alike**0.5, texts), per)
        gaps = shared + draw.normal(0, (1 - alike) ** 0.5, texts * per)
        ours, theirs = (measures.collect(examples) for _ in range(2))  # type: ignore[arg-type]
        index, counted = np.arange(texts * per), np.full(texts * per, 128)
        for collector, losses_of in ((ours, 300 + gaps), (theirs, np.full(texts * per, 300.0))):
            for part in np.array_split(draw.permutation(index), 3):  # batches mix the texts
                found = {
                    "losses": losses_of[part],
                    "right": counted[part],
                    "counted": counted[part],
                }
                collector.add(part, found)
        verdict = ours.evaluation().compare(
            theirs.evaluation(), RNG(seed), name="north", rival="local_only"
        )
        told += verdict["outcome"] != "unclear"
    assert told <= 11  # of 100 at a level of 5 %: P(more) < 1 %
