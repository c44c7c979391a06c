"""Entities marked by IOB2 tags: counts by type, with intervals and a verdict over sentences.

IOB2: Ramshaw and Marcus 1995, "Text Chunking using Transformation-Based Learning"; Tjong Kim Sang
and De Meulder 2003, "Introduction to the CoNLL-2003 Shared Task". ``B-TYPE`` begins an entity,
``I-TYPE`` continues it, ``O`` is outside. An entity is correct if its type and both its ends are
correct, as in CoNLL's evaluation. An ``I-TYPE`` begins an entity if no entity of its type is before
it.

Entities of a sentence depend on one another. So intervals resample whole sentences, and the test
swaps the entities of the two models in randomly chosen sentences (Yeh 2000, "More Accurate Tests
for the Statistical Significance of Result Differences").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.examples import IGNORED, Indices
from fedgraft.common.metrics.evaluation import PARTS_LIMIT
from fedgraft.common.metrics.intervals import percentile_interval, redrawn_sums
from fedgraft.common.metrics.tally import Counts, Tally
from fedgraft.common.metrics.verdict import (
    Rival,
    Verdict,
    as_points,
    judge,
    not_known,
    numbered,
    tell,
)

__all__ = ["OUTSIDE", "TagEvaluation", "TagMeasures", "entities", "types_of"]

OUTSIDE = "O"
COLUMNS = 3  # counts of a type: correct, predicted and true entities
DRAWS = 1000


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the entities that IOB2 ``tags`` mark: type, first word, first word after it."""
    found: set[tuple[str, int, int]] = set()
    kind, start = "", 0
    for at, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, own = tag.partition("-")
        if kind and (prefix != "I" or own != kind):
            found.add((kind, start, at))
            kind = ""
        if tag != OUTSIDE and not kind:
            kind, start = own, at
    return found


def types_of(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the entity types in ``labels``, sorted."""
    return tuple(sorted({label.partition("-")[2] for label in labels if label != OUTSIDE}))


def f1_of(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return F1 of ``counts`` [..., 3] (correct, predicted, true); 0 if all are zero."""
    both = counts[..., 1] + counts[..., 2]
    return np.asarray(2 * counts[..., 0] / np.maximum(both, 1), np.float64)


@dataclass(frozen=True)
class TagEvaluation:
    """The loss, the tokens and the entities of each sentence, in order.

    ``losses`` are float64 (nats); the ``right`` and ``counted`` tokens are int64; all are [n].
    ``found``, int64 [n, types, 3], are correct, predicted and true entities, by type in ``types``.
    """

    losses: NDArray[np.float64]
    right: Counts
    counted: Counts
    found: Counts
    types: tuple[str, ...]

    @property
    def tally(self) -> Tally:
        """Return the sums: a confusion matrix of correct and wrong tokens, with the entities."""
        right, counted = int(self.right.sum()), int(self.counted.sum())
        confusion = np.array([[right, counted - right], [0, 0]], np.int64)
        return Tally(float(self.losses.sum()), confusion, self.found.sum(0).reshape(-1))

    def intervals(self, generator: np.random.Generator) -> dict[str, Any]:
        """Return 95 % intervals of entity F1 and token accuracy over sentences.

        The result is {} for fewer than two sentences.
        """
        if len(self.counted) < 2:
            return {}
        columns = [*self.found.sum(1).T, self.right, self.counted]
        sums = redrawn_sums(np.stack(columns), generator)
        accuracy = sums[3] / np.maximum(sums[4], 1)
        return {
            "f1_interval": list(percentile_interval(f1_of(sums[:3].T))),
            "accuracy_interval": list(percentile_interval(accuracy)),
        }

    def compare(
        self, other: "TagEvaluation", generator: np.random.Generator, *, name: str, rival: Rival
    ) -> dict[str, Any]:
        """Return the difference of entity F1 to ``other`` on the same sentences.

        ``name`` is the site.
        """
        counts = self.found.sum(1), other.found.sum(1)
        return _verdict(*counts, generator, name, rival).to_json()

    def joined(self, others: "Sequence[TagEvaluation]") -> "TagEvaluation":
        """Return one evaluation of the sentences of this one and of ``others``, in order."""
        every = (self, *others)
        columns = zip(*((e.losses, e.right, e.counted, e.found) for e in every), strict=True)
        losses, right, counted, found = (np.concatenate(column) for column in columns)
        return TagEvaluation(losses, right, counted, found, self.types)

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON values."""
        arrays = ("losses", "right", "counted", "found")
        return {**{key: getattr(self, key).tolist() for key in arrays}, "types": list(self.types)}


@dataclass(frozen=True)
class TagMeasures:
    """The counts of a job for sentences of up to ``most_parts`` tokens with tags in ``labels``."""

    labels: tuple[str, ...]
    most_parts: int

    classes = 2
    loss_limit = PARTS_LIMIT

    @property
    def types(self) -> tuple[str, ...]:
        """Return the entity types, sorted."""
        return types_of(self.labels)

    @property
    def size(self) -> int:
        """Return the number of additional counts.

        They are the correct, predicted and true entities of each type.
        """
        return COLUMNS * len(self.types)

    @property
    def named(self) -> tuple[str, ...]:
        """Return the word "entities" and the types."""
        return ("entities", *self.types)

    def fits(self, tally: Tally) -> bool:
        """Return whether correct entities are not more than predicted ones or than true ones."""
        if tally.more.shape != (self.size,) or (tally.more < 0).any() or tally.confusion[1].any():
            return False
        right, predicted, true = tally.more.reshape(-1, COLUMNS).T
        return bool((right <= predicted).all() and (right <= true).all())

    def without_few(self, counts: Counts) -> Counts:
        """Return ``counts`` unchanged: they are over all examples together."""
        return counts

    def collect(self, examples: Any) -> "_Collector":
        """Return a collector of a model's predictions for ``examples`` (tagged sentences)."""
        return _Collector(self, examples)

    def evaluation(self, value: Mapping[str, Any]) -> TagEvaluation:
        """Return the evaluation that ``to_json`` wrote."""
        right, counted = (np.array(value[key], np.int64) for key in ("right", "counted"))
        types = tuple(value["types"])
        found = np.array(value["found"], np.int64).reshape(-1, len(types), COLUMNS)
        return TagEvaluation(np.array(value["losses"], np.float64), right, counted, found, types)

    def figures(self, tally: Tally) -> dict[str, Any]:
        """Return entity precision, recall and F1 over all types (micro), and of each type.

        ``macro_f1`` is the mean F1 over the types that are true or predicted. ``accuracy`` is over
        tokens; ``loss`` is the mean in nats per token.
        """
        by_type = tally.more.reshape(-1, COLUMNS)
        right, predicted, true = by_type.sum(0).tolist()
        occur = by_type[:, 1:].any(1)
        return {
            "f1": float(f1_of(by_type.sum(0))),
            "precision": right / max(predicted, 1),
            "recall": right / max(true, 1),
            "macro_f1": float(f1_of(by_type[occur]).mean()) if occur.any() else 0.0,
            "accuracy": tally.accuracy,
            "loss": tally.mean_loss,
            "entities": {
                kind: {
                    "f1": float(f1_of(one)),
                    "precision": int(one[0]) / max(int(one[1]), 1),
                    "recall": int(one[0]) / max(int(one[2]), 1),
                    "true": int(one[2]),
                }
                for kind, one in zip(self.types, by_type, strict=True)
            },
        }


class _Collector:
    """A collector of entities per sentence; it restores the order of the sentences."""

    def __init__(self, measures: TagMeasures, examples: Any) -> None:
        self._labels, self._types = measures.labels, measures.types
        self._losses = np.zeros(len(examples))
        self._right, self._counted = np.zeros((2, len(examples)), np.int64)
        self._found = np.zeros((len(examples), len(self._types), COLUMNS), np.int64)
        self._found[..., 2] = examples.cut

    def add(self, index: Indices, found: Mapping[str, Any]) -> None:
        """Add a batch from ``Tokens.counts``: ``true`` and ``predicted`` [b, width], and sums."""
        self._losses[index] = found["losses"]
        self._right[index], self._counted[index] = found["right"], found["counted"]
        for at, true, predicted in zip(
            index.tolist(), found["true"], found["predicted"], strict=True
        ):
            words = true != IGNORED
            wanted, given = (self._entities(tags[words]) for tags in (true, predicted))
            for column, those in enumerate((wanted & given, given, wanted)):
                for kind, *_ in those:
                    self._found[at, self._types.index(kind), column] += 1

    def _entities(self, tags: Indices) -> set[tuple[str, int, int]]:
        return entities([self._labels[tag] for tag in tags.tolist()])

    def evaluation(self) -> TagEvaluation:
        """Return the evaluation of all added sentences."""
        return TagEvaluation(self._losses, self._right, self._counted, self._found, self._types)


def _verdict(
    ours: Counts, theirs: Counts, generator: np.random.Generator, name: str, rival: Rival
) -> Verdict:
    """Compare entity F1 of two models on the same sentences; counts are [sentences, 3]."""
    if not len(ours) or not ours[:, 2].sum():
        return Verdict("unknown", not_known(name, "entities"), 0.0, None, 1.0)
    shares = tuple(float(f1_of(one.sum(0))) for one in (ours, theirs))
    difference, interval, p_value = shares[0] - shares[1], None, 1.0
    if len(ours) > 1:
        sums = redrawn_sums(np.concatenate([ours, theirs], 1).T, generator)
        interval = percentile_interval(f1_of(sums[:3].T) - f1_of(sums[3:].T))
        p_value = _swapped(ours, theirs, abs(difference), generator)
    outcome = judge(interval, p_value, higher=True)
    first, second = (f"{100 * share:.1f} %" for share in shares)
    span = "" if interval is None else ", 95 % interval " + " to ".join(map(as_points, interval))
    sentences = numbered(len(ours), "1 sentence", "sentences")
    sentence = tell(
        outcome,
        name=name,
        rival=rival,
        shown=(f"entity F1 {first}", second),
        facts=f"difference {as_points(difference)} points{span}, {sentences}",
        p_value=p_value,
    )
    return Verdict(outcome, sentence, difference, interval, p_value)


def _swapped(ours: Counts, theirs: Counts, least: float, generator: np.random.Generator) -> float:
    """Return the two-sided p-value: how often random swaps of sentences give as large a difference.

    The observed order counts as one of the draws, so that the p-value is never 0.
    """
    gaps, found = theirs - ours, 0
    for _ in range(DRAWS):
        moved = gaps[generator.random(len(gaps)) < 0.5].sum(0)
        pair = f1_of(ours.sum(0) + moved), f1_of(theirs.sum(0) - moved)
        found += bool(abs(pair[0] - pair[1]) >= least - 1e-12)
    return (found + 1) / (DRAWS + 1)
