"""Scores that predict how well a frozen backbone transfers to a task, from sums over sites.

They need no training.

    LogME    mean log evidence of a Bayesian linear model for each class (You et al., "LogME:
             Practical Assessment of Pre-trained Models for Transfer Learning", ICML 2021)
    H-score  tr(cov(f)^-1 cov(E[f|y])) (Bao et al., "An Information-Theoretic Approach to
             Transferability in Task Transfer Learning", ICIP 2019)
    NCE      -H(Y|Z) for the source labels Z that the backbone's own head predicts (Tran et al.,
             "Transferability and Hardness of Supervised Classification Tasks", ICCV 2019)
    LEEP     log likelihood of the labels under P(y|z) averaged over the head's own P(z|x) (Nguyen
             et al., "LEEP: A New Measure to Evaluate Transferability", ICML 2020)

A higher score is better. LogME and H-score need class counts, sums of features by class and their
second moments. NCE needs the number of examples for each pair of label and source label. LEEP needs
the mean joint probability and then, in a second pass, one more sum. All of these are sums over
examples, so they could go through a secure sum.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["Moments", "conditional", "h_score", "leep_terms", "logme", "nce"]

Matrix = NDArray[np.float64]

NEGLIGIBLE = 1e-9  # relative to the largest eigenvalue; smaller is float32 rounding
STEPS = 200  # of the fixed-point iteration; about ten are enough
SETTLED = 1e-10  # relative change of both precisions
PLENTY = 1e12  # alpha over beta times the largest eigenvalue: weights are 0, alpha is free
TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Moments:
    """Sums over examples with ``d`` features of ``c`` classes, all float64.

    ``counts`` [c], ``sums`` of the features by class [c, d], ``second`` moments F'F [d, d].
    """

    counts: Matrix
    sums: Matrix
    second: Matrix

    @classmethod
    def of(cls, features: NDArray[Any], labels: NDArray[np.int64], classes: int) -> Self:
        """Return the sums over ``features`` [n, d] with ``labels`` [n] below ``classes``."""
        values = np.asarray(features, np.float64)
        one_hot = np.eye(classes)[labels]
        return cls(one_hot.sum(0), one_hot.T @ values, values.T @ values)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.counts + other.counts, self.sums + other.sums, self.second + other.second
        )

    @property
    def examples(self) -> float:
        """Return the number of examples."""
        return float(self.counts.sum())


def logme(moments: Moments) -> float:
    """Return the log evidence per example in nats, the mean over the classes that occur.

    Each class is a regression of 0 and 1 on the features, y ~ N(Fw, 1/beta) with w ~ N(0, 1/alpha),
    at the alpha and beta that maximise the evidence (MacKay's fixed point).
    """
    values, vectors = np.linalg.eigh(moments.second)
    kept = values > NEGLIGIBLE * max(values[-1], 0.0)
    sigma, basis = values[kept], vectors[:, kept]
    present = np.flatnonzero(moments.counts)
    found = [
        _evidence(sigma, moments.sums[label] @ basis, moments.counts[label], moments)
        for label in present
    ]
    return float(np.mean(found)) if found else float("nan")


def _evidence(sigma: Matrix, projected: Matrix, norm: float, moments: Moments) -> float:
    """Return the largest log evidence for one class, divided by the number of examples.

    ``sigma`` are the nonzero eigenvalues of F'F, ``projected`` is F'y in their basis, and ``norm``
    is y'y. No model can explain the part of y that is orthogonal to all features.
    """
    n, d = moments.examples, len(moments.second)
    explained = projected**2 / sigma  # of y'y, in each direction
    beyond = max(norm - explained.sum(), NEGLIGIBLE * norm)
    alpha = beta = 1.0
    for _ in range(STEPS):
        gamma, weights, residual = _posterior(sigma, explained, beyond, alpha / beta)
        before = alpha, beta
        beta = (n - gamma) / residual
        alpha = min(max(gamma / max(weights, TINY), TINY), beta * PLENTY * sigma.max(initial=TINY))
        if np.allclose((alpha, beta), before, rtol=SETTLED, atol=0):
            break
    _, weights, residual = _posterior(sigma, explained, beyond, alpha / beta)
    log_det = np.log(alpha + beta * sigma).sum() + (d - len(sigma)) * np.log(alpha)
    evidence = d * np.log(alpha) + n * np.log(beta / (2 * np.pi)) - log_det
    return float((evidence - beta * residual - alpha * weights) / (2 * n))


def _posterior(
    sigma: Matrix, explained: Matrix, beyond: float, ratio: float
) -> tuple[float, float, float]:
    """Return the effective parameters, |m|^2 and |Fm - y|^2.

    m are the mean weights at the ``ratio`` alpha/beta.
    """
    shrunk = sigma / (sigma + ratio)
    weights = (explained * shrunk**2 / sigma).sum()
    residual = beyond + (explained * (1 - shrunk) ** 2).sum()
    return float(shrunk.sum()), float(weights), float(residual)


def h_score(moments: Moments) -> float:
    """Return the ratio of between-class and total variance of the features, over all directions.

    The ratios of all directions are summed: 0 to c - 1. Directions without variance (fewer examples
    than features) do not count. With few examples for many features the score is close to its
    maximum for any backbone.
    """
    n = max(moments.examples, 1.0)
    present = moments.counts > 0
    counts, sums = moments.counts[present], moments.sums[present]
    mean = sums.sum(0) / n
    values, vectors = np.linalg.eigh(moments.second / n - np.outer(mean, mean))
    kept = values > NEGLIGIBLE * max(values[-1], 0.0)
    centred = (sums / counts[:, None] - mean) @ vectors[:, kept]
    return float((counts[:, None] / n * centred**2 / values[kept]).sum())


def nce(joint: NDArray[Any]) -> float:
    """Return the negative conditional entropy -H(Y|Z) in nats, at most 0.

    ``joint`` [c, z] is the number of examples for each label and source label.
    """
    share = joint / joint.sum()
    given = conditional(joint)
    seen = share > 0
    return float((share[seen] * np.log(given[seen])).sum())


def conditional(joint: NDArray[Any]) -> Matrix:
    """Return P(y|z), float64 [c, z]: the columns of ``joint`` [c, z] divided by their sums.

    A column with sum 0 gives zeros.
    """
    total = joint.sum(0, keepdims=True)
    given: Matrix = np.divide(joint, total, out=np.zeros(joint.shape), where=total > 0)
    return given


def leep_terms(given: Matrix, probabilities: NDArray[Any], labels: NDArray[np.int64]) -> float:
    """Return the sum of log sum_z P(y|z) P(z|x) over examples, nats.

    LEEP is the mean over the examples of all sites. ``given`` [c, z] is ``conditional`` of the
    summed probabilities; ``probabilities`` [n, z] are the head's; ``labels`` are [n].
    """
    likelihood = (given[labels] * probabilities).sum(1)
    return float(np.log(np.maximum(likelihood, np.finfo(np.float32).tiny)).sum())
