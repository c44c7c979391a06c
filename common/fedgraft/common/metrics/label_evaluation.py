"""A model's predictions for a site's labelled examples, and the verdict on federating at that site.

All functions treat test examples as independent draws. Many images of one patient are not
independent; then every interval here is too narrow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt

from fedgraft.common.metrics.intervals import (
    macro_f1_difference,
    macro_f1_interval,
    mcnemar,
    paired_interval,
    wilson_interval,
)
from fedgraft.common.metrics.tally import Tally
from fedgraft.common.metrics.verdict import (
    Rival,
    Verdict,
    as_points,
    judge,
    not_known,
    numbered,
    tell,
)

__all__ = ["LabelEvaluation", "verdict"]


@dataclass(frozen=True)
class LabelEvaluation:
    """The summed ``loss`` (nats), and true and predicted labels, both int64 [examples], in order.

    Derived values are computed on request: most entries in the confusion matrices of thousands of
    sites are zero, so the matrices are not stored. ``more`` are the additional counts of
    ``measures``.
    """

    loss: float
    true: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    classes: int
    more: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def tally(self) -> Tally:
        """Return the sums."""
        return Tally.of(self.loss, self.true, self.predicted, self.classes, self.more)

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Return a mask of the correctly predicted examples, bool [examples]."""
        correct: npt.NDArray[np.bool_] = self.predicted == self.true
        return correct

    def intervals(self, generator: np.random.Generator) -> dict[str, Any]:
        """Return 95 % intervals of accuracy and macro F1, as ``KEY_interval``."""
        tally = self.tally
        return {
            "accuracy_interval": list(wilson_interval(tally.correct, tally.examples)),
            "macro_f1_interval": list(macro_f1_interval(tally.confusion, generator)),
        }

    def compare(
        self, other: "LabelEvaluation", generator: np.random.Generator, *, name: str, rival: Rival
    ) -> dict[str, Any]:
        """Compare this model, the federated one, with ``other`` on the same examples.

        ``name`` is the site. Return the ``Verdict``, and ``macro_f1_difference`` with its paired
        bootstrap interval; differences are fractions -1..1.
        """
        judged = verdict(self.correct, other.correct, name=name, rival=rival)
        gap, interval = macro_f1_difference(
            self.true, self.predicted, other.predicted, generator=generator
        )
        return {
            **judged.to_json(),
            "macro_f1_difference": gap,
            "macro_f1_difference_interval": list(interval),
        }

    def joined(self, others: "Sequence[LabelEvaluation]") -> "LabelEvaluation":
        """Return one evaluation of the examples of this one and of ``others``, in order."""
        every = (self, *others)
        loss = reduce(add, (one.loss for one in every))  # since 3.12 sum() rounds differently
        true = np.concatenate([one.true for one in every])
        predicted = np.concatenate([one.predicted for one in every])
        more = reduce(add, (one.more for one in every))
        return LabelEvaluation(loss, true, predicted, self.classes, more)

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON values: two labels per test example."""
        arrays = {"true": self.true.tolist(), "predicted": self.predicted.tolist()}
        at = np.flatnonzero(self.more)  # most bins are empty
        more = [len(self.more), at.tolist(), self.more[at].tolist()]
        return {**vars(self), **arrays, "more": more}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "LabelEvaluation":
        """Return the evaluation that ``to_json`` wrote."""
        true, predicted = (np.array(value[key], np.int64) for key in ("true", "predicted"))
        size, at, counts = value.get("more", (0, [], []))  # older runs have no "more"
        more = np.zeros(size, np.int64)
        more[at] = counts
        return cls(value["loss"], true, predicted, value["classes"], more)


def verdict(
    federated_correct: npt.NDArray[np.bool_],
    local_correct: npt.NDArray[np.bool_],
    *,
    name: str,
    rival: Rival = "local_only",
) -> Verdict:
    """Compare two models on the same test examples of the site ``name``.

    Args:
        federated_correct: bool [n], True where the federated model is correct.
        local_correct: bool [n], True where the other model is correct, in the same order.
        name: the site's name in the sentence; it is not escaped.
        rival: the other model: the site's own model, or the backbone without training.

    Raises:
        ValueError: the two are not boolean vectors of one length.
    """
    federated, local = np.asarray(federated_correct), np.asarray(local_correct)
    if federated.ndim != 1 or federated.shape != local.shape:
        raise ValueError(f"two vectors of one length, not {federated.shape} and {local.shape}")
    if federated.dtype != np.bool_ or local.dtype != np.bool_:
        raise ValueError(f"boolean vectors, not {federated.dtype} and {local.dtype}")
    if federated.size == 0:
        return Verdict("unknown", not_known(name, "examples"), 0.0, (-1.0, 1.0), 1.0)

    both = int(np.sum(federated & local))
    only_federated = int(np.sum(federated & ~local))
    only_local = int(np.sum(~federated & local))
    difference = (only_federated - only_local) / federated.size
    interval = paired_interval(both, only_federated, only_local, federated.size)
    p_value = mcnemar(only_federated, only_local)
    outcome = judge(interval, p_value, higher=True)
    ours, theirs = (f"{100 * float(one.mean()):.1f} %" for one in (federated, local))
    span = " to ".join(map(as_points, interval))
    facts = f"difference {as_points(difference)} points, 95 % interval {span}"
    witness = numbered(federated.size, "1 test example", "test examples")
    if outcome == "unclear" and rival == "zero_shot":
        sentence = (
            f"Against the backbone untouched (zero-shot, {theirs}) {witness} cannot tell "
            f"({facts}, p = {p_value:.2f})."
        )
    else:
        sentence = tell(
            outcome,
            name=name,
            rival=rival,
            shown=(f"{ours} right", theirs if rival == "local_only" else f"{theirs} zero-shot"),
            facts=facts,
            p_value=p_value,
            witness=witness,
        )
    return Verdict(outcome, sentence, difference, interval, p_value)
