"""Scores from sums are those of the papers on the pooled data, whoever has which example."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import BayesianRidge
from sklearn.metrics import mutual_info_score
from support.matrix import tries

from fedgraft.common.metrics.transferability import (
    Moments,
    conditional,
    h_score,
    leep_terms,
    logme,
    nce,
)

Array = NDArray[Any]
SAME = 1e-6


def rows(
    n: int, d: int, classes: int, *, seed: int = 0, signal: float = 1.0
) -> tuple[Array, Array]:
    """Features that tell the classes apart by ``signal``, float32 as a backbone gives them."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, n)
    centres = draw.normal(0, signal, (classes, d))
    mixing = draw.normal(0, 1, (d, d)) / np.sqrt(d)
    features = centres[labels] + draw.normal(0, 1, (n, d)) @ mixing + 0.5
    return features.astype(np.float32), labels


def split(n: int, sites: int, seed: int) -> Iterator[Array]:
    owner = np.random.default_rng(seed).integers(0, sites, n)
    return (np.flatnonzero(owner == site) for site in range(sites))


def direct_logme(features: Array, labels: Array) -> float:
    """The published algorithm, on the examples themselves: one SVD, then the fixed point."""
    u, s, _ = np.linalg.svd(features.astype(np.float64), full_matrices=False)
    n, d = features.shape
    found = []
    for label in np.unique(labels):
        y = (labels == label).astype(np.float64)
        x = u.T @ y
        beyond = max(y @ y - x @ x, 1e-9 * (y @ y))
        alpha = beta = 1.0
        for _ in range(500):
            t = alpha / beta
            gamma = (s**2 / (s**2 + t)).sum()
            m2 = (s**2 * x**2 / (s**2 + t) ** 2).sum()
            res2 = (x**2 / (1 + s**2 / t) ** 2).sum() + beyond
            alpha, beta = gamma / m2, (n - gamma) / res2
        t = alpha / beta
        m2 = (s**2 * x**2 / (s**2 + t) ** 2).sum()
        res2 = (x**2 / (1 + s**2 / t) ** 2).sum() + beyond
        evidence = d / 2 * np.log(alpha) + n / 2 * np.log(beta) - n / 2 * np.log(2 * np.pi)
        evidence -= 0.5 * np.log(alpha + beta * s**2).sum() + (d - len(s)) / 2 * np.log(alpha)
        found.append((evidence - beta / 2 * res2 - alpha / 2 * m2) / n)
    return float(np.mean(found))


def direct_h_score(features: Array, labels: Array) -> float:
    """The paper's own few lines."""
    values = features.astype(np.float64)
    means = np.zeros_like(values)
    for label in np.unique(labels):
        means[labels == label] = values[labels == label].mean(0)
    between, total = np.cov(means.T, bias=True), np.cov(values.T, bias=True)
    return float(np.trace(np.linalg.pinv(total, rcond=1e-9, hermitian=True) @ between))


@settings(max_examples=tries(60), deadline=None)
@given(
    n=st.integers(12, 150),
    d=st.integers(1, 40),
    classes=st.integers(2, 6),
    sites=st.integers(1, 7),
    seed=st.integers(0, 10**6),
)
def test_sums_of_sites_score_as_the_pooled_data(
    n: int, d: int, classes: int, sites: int, seed: int
) -> None:
    features, labels = rows(n, d, classes, seed=seed)
    pooled = Moments.of(features, labels, classes)
    parts = [Moments.of(features[i], labels[i], classes) for i in split(n, sites, seed)]
    summed = parts[0]
    for part in parts[1:]:
        summed = summed + part
    assert logme(summed) == pytest.approx(logme(pooled), rel=SAME, abs=SAME)
    assert h_score(summed) == pytest.approx(h_score(pooled), rel=SAME, abs=SAME)
    direct = direct_logme(features, labels)
    assume(np.isfinite(direct))  # features that explain nothing: there its alpha overflows
    assert logme(summed) == pytest.approx(direct, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("signal", [0.0, 0.3, 2.0])
def test_logme_is_the_evidence_that_scikit_learn_maximises(signal: float) -> None:
    features, labels = rows(300, 12, 4, signal=signal)
    known = []
    for label in range(4):
        ridge = BayesianRidge(
            max_iter=3000, tol=1e-13, alpha_1=0, alpha_2=0, lambda_1=0, lambda_2=0,
            compute_score=True, fit_intercept=False,
        )  # fmt: skip
        ridge.fit(features.astype(np.float64), (labels == label).astype(np.float64))
        known.append(ridge.scores_[-1] / len(labels))
    assert logme(Moments.of(features, labels, 4)) == pytest.approx(np.mean(known), abs=SAME)


@pytest.mark.parametrize(("n", "d"), [(300, 12), (40, 40), (30, 64)])
def test_scores_are_the_papers_also_with_fewer_examples_than_features(n: int, d: int) -> None:
    features, labels = rows(n, d, 3)
    moments = Moments.of(features, labels, 3)
    assert h_score(moments) == pytest.approx(direct_h_score(features, labels), abs=SAME)
    assert logme(moments) == pytest.approx(direct_logme(features, labels), abs=SAME)


def test_the_scale_of_features_does_not_matter() -> None:
    features, labels = rows(200, 10, 3)
    plain, scaled = (Moments.of(features * by, labels, 3) for by in (1, 1e-3))
    assert logme(scaled) == pytest.approx(logme(plain), abs=SAME)
    assert h_score(scaled) == pytest.approx(h_score(plain), abs=SAME)


def test_a_class_that_nobody_has_changes_nothing() -> None:
    features, labels = rows(200, 10, 3)
    few, many = (Moments.of(features, labels, classes) for classes in (3, 9))
    assert logme(many) == pytest.approx(logme(few))
    assert h_score(many) == pytest.approx(h_score(few))


def test_features_that_say_more_score_higher() -> None:
    found = [Moments.of(*rows(400, 12, 4, signal=signal), 4) for signal in (0.0, 0.3, 1.0, 3.0)]
    for score in (logme, h_score):
        values = [score(one) for one in found]
        assert values == sorted(values)
        assert values[-1] > values[0] + 0.1
    assert h_score(found[0]) >= 0 and h_score(found[-1]) <= 3 + 1e-9


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_features_that_say_nothing_have_a_score(value: float) -> None:
    moments = Moments.of(np.full((20, 5), value, np.float32), np.arange(20) % 2, 2)
    assert np.isfinite(logme(moments))
    assert h_score(moments) == pytest.approx(0, abs=SAME)


def test_nce_is_mutual_information_without_the_entropy_of_the_labels() -> None:
    draw = np.random.default_rng(3)
    source = draw.integers(0, 7, 500)
    labels = np.where(draw.random(500) < 0.6, source % 4, draw.integers(0, 4, 500))
    joint = np.zeros((5, 9))  # a label and two source labels that never occur
    np.add.at(joint, (labels, source), 1)
    share = np.bincount(labels) / 500
    entropy = -(share * np.log(share)).sum()
    assert nce(joint) == pytest.approx(mutual_info_score(labels, source) - entropy)
    assert nce(np.diag([3.0, 4.0])) == 0
    assert nce(np.ones((2, 3))) == pytest.approx(-np.log(2))


def test_leep_is_the_papers_and_nce_where_the_head_is_sure() -> None:
    draw = np.random.default_rng(4)
    labels = draw.integers(0, 3, 60)
    theta = draw.dirichlet(np.ones(5), 60)
    by_hand = 0.0
    joint = np.array([[theta[labels == y, z].sum() / 60 for z in range(5)] for y in range(3)])
    for x, y in zip(theta, labels, strict=True):
        by_hand += np.log(sum(joint[y, z] / joint[:, z].sum() * x[z] for z in range(5))) / 60
    given = conditional(np.eye(3)[labels].T @ theta)
    assert leep_terms(given, theta, labels) / 60 == pytest.approx(by_hand)
    halves = [leep_terms(given, theta[i], labels[i]) for i in (slice(25), slice(25, 60))]
    assert sum(halves) / 60 == pytest.approx(by_hand)
    sure = np.eye(5)[theta.argmax(1)]
    counts = np.eye(3)[labels].T @ sure
    assert leep_terms(conditional(counts), sure, labels) / 60 == pytest.approx(nce(counts))
