"""The sums that a site adds to a backbone's transferability scores and to its few-shot accuracy.

Few-shot classification is by nearest prototype (Snell et al., "Prototypical Networks for Few-shot
Learning", 2017). The prototype of a class is the mean of the unit features of ``k`` of its examples
at every site. An example gets the class whose prototype has the largest cosine with its feature.
With 0 shots, the prototype is the feature of the label's name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgraft.client.selection.features import Features
from fedgraft.common.examples import Indices
from fedgraft.common.metrics.transferability import Moments, leep_terms

__all__ = ["Answers", "Prototypes", "SiteSums", "draw_shots", "site_answers", "site_sums", "unit"]

Matrix = NDArray[np.float64]
Prototypes = Mapping[int, Matrix]


@dataclass(frozen=True)
class SiteSums:
    """Sums over the training examples of a site, or of several, all float64.

    ``soft`` [c, z] adds the probabilities of the source labels by class. ``hard`` [c, z] counts the
    likeliest source labels. Both are empty without a source head. ``shots[k]`` [c, d] adds the unit
    features of up to ``k`` examples of each class at each site.
    """

    moments: Moments
    soft: Matrix
    hard: Matrix
    shots: dict[int, Matrix]

    def __add__(self, other: "SiteSums") -> "SiteSums":
        shots = {k: mine + other.shots[k] for k, mine in self.shots.items()}
        return SiteSums(
            self.moments + other.moments, self.soft + other.soft, self.hard + other.hard, shots
        )


def site_sums(
    blocks: Iterator[Features],
    labels: Indices,
    classes: int,
    *,
    shots: Sequence[int],
    generator: np.random.Generator,
) -> SiteSums | None:
    """Return the sums of one site; None if there are no blocks.

    ``labels`` [n] are those of all ``blocks``, in order. ``generator`` draws the examples that are
    the site's shots.
    """
    order = draw_shots(labels, generator)
    total, start = None, 0
    for block in blocks:
        end = start + len(block.labels)
        found = _block_sums(block, order[start:end], classes, shots)
        total, start = found if total is None else total + found, end
    return total


def _block_sums(block: Features, turns: Indices, classes: int, shots: Sequence[int]) -> SiteSums:
    one_hot = np.eye(classes)[block.labels]
    sources = block.probabilities.shape[1]
    likeliest = np.zeros((len(one_hot), sources))
    if sources:
        likeliest[np.arange(len(one_hot)), block.probabilities.argmax(1)] = 1
    units = unit(block.values) if any(shots) else np.empty((len(one_hot), 0))
    return SiteSums(
        Moments.of(block.values, block.labels, classes),
        one_hot.T @ block.probabilities.astype(np.float64),
        one_hot.T @ likeliest,
        {k: (one_hot * (turns < k)[:, None]).T @ units for k in shots if k},
    )


def draw_shots(labels: Indices, generator: np.random.Generator) -> Indices:
    """Return each example's turn within its class in a random order, int64 [n], from 0.

    The ``k`` shots of a class are its examples with turns below ``k``. So a smaller number of shots
    is a subset of a larger one.
    """
    turns = np.zeros(len(labels), np.int64)
    mixed = generator.permutation(len(labels))
    for label in np.unique(labels):
        mine = mixed[labels[mixed] == label]
        turns[mine] = np.arange(len(mine))
    return turns


@dataclass(frozen=True)
class Answers:
    """Sums of the second pass: ``leep`` in nats over training examples, ``right`` test answers.

    ``right[k]`` counts the ``tested`` examples that the prototypes of ``k`` shots classify right.
    """

    leep: float
    tested: int
    right: dict[int, int]

    def __add__(self, other: "Answers") -> "Answers":
        right = {k: mine + other.right[k] for k, mine in self.right.items()}
        return Answers(self.leep + other.leep, self.tested + other.tested, right)


def site_answers(
    train: Iterator[Features],
    test: Iterator[Features],
    given: Matrix,
    prototypes: Prototypes,
    *,
    knows_labels: bool,
) -> Answers:
    """Return the sums of the second pass over a site's ``train`` and ``test`` features.

    ``given`` [c, z] is P(label | source label). With ``knows_labels``, the source labels are the
    job's labels, and the prediction of the backbone's own head is the answer of 0 shots.
    """
    leep = sum((leep_terms(given, one.probabilities, one.labels) for one in train), 0.0)
    right = dict.fromkeys([*prototypes, *([0] if knows_labels else [])], 0)
    tested = 0
    for block in test:
        tested += len(block.labels)
        for k in right:
            if k == 0 and knows_labels:
                answers = block.probabilities.argmax(1)
            else:
                answers = nearest(unit(block.values), prototypes[k])
            right[k] += int((answers == block.labels).sum())
    return Answers(leep, tested, right)


def nearest(units: Matrix, prototypes: Matrix) -> Indices:
    """Return for each of ``units`` [n, d] the class whose prototype [c, d] has the largest cosine.

    A class whose prototype is zero, because no site has a shot of it, is never the answer.
    """
    known = np.flatnonzero(prototypes.any(1))
    if not len(known):
        return np.full(len(units), -1)
    found: Indices = known[(units @ unit(prototypes[known]).T).argmax(1)]
    return found


def unit(values: NDArray[np.floating]) -> Matrix:
    """Return the rows of ``values`` [n, d] scaled to length 1, float64; a row of zeros stays."""
    exact = np.asarray(values, np.float64)
    length = np.linalg.norm(exact, axis=1, keepdims=True)
    scaled: Matrix = np.divide(exact, length, out=np.zeros(exact.shape), where=length > 0)
    return scaled
