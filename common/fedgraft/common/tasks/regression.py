"""Regression: predict a number for each text or image, in a range that the job sets.

``data.lowest`` and ``data.highest`` are the range of the target. Models learn the target scaled to
-1..1, so that one learning rate fits any unit. A prediction is clipped to this range. Only sums
over its examples leave a site; the metrics over all sites' examples follow from these sums exactly:

    n, sum y, sum y^2, sum p, sum p^2, sum y p, sum |p - y|, sum (p - y)^2

for targets y and predictions p. Both are scaled to 0..1, so that no sum is negative. Under secure
aggregation the sums are whole numbers of ``STEP``: a site rounds each of its sums once.

    MAE = sum |p - y| / n        R2 = 1 - sum (p - y)^2 / (sum y^2 - (sum y)^2 / n)
    Pearson = (n sum yp - sum y sum p) / sqrt((n sum y^2 - (sum y)^2) (n sum p^2 - (sum p)^2))
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.encoding import Keep, Rows, Settings
from fedgraft.common.errors import DataError
from fedgraft.common.examples import Examples, Indices, Inputs, concatenate
from fedgraft.common.metrics.evaluation import TALLY_LIMIT
from fedgraft.common.metrics.intervals import percentile_interval, permutation_test, redrawn_sums
from fedgraft.common.metrics.metric import Metric
from fedgraft.common.metrics.tally import Counts, Tally
from fedgraft.common.metrics.verdict import Rival, Verdict, judge, not_known, numbered, tell
from fedgraft.common.modalities import Modality, Processor
from fedgraft.common.section import IllegalJob
from fedgraft.common.tasks.base import Cell, Differences, Reading, Task, Wrapped
from fedgraft.common.tasks.labels import head_usage
from fedgraft.common.tasks.numbers import OUTSIDE, UNIT, read_number
from fedgraft.common.tasks.refusals import without_classes

__all__ = ["NumberEvaluation", "NumberMeasures", "Numbered", "Regression"]

Values = NDArray[np.float64]

SUMS = 7  # beside the number of examples
STEP = 2.0**-16  # rounding step of a sum, about 1/65,000 of the range
PROBLEM = "regression"  # transformers' name, in config.json
LARGEST_SPAN = 1e100  # of the range: its square is a finite float
LOW_BITS = 12  # a sum is a high and a low part: low parts of many sites still fit a masked sum
MAE = Metric("mae", "mean absolute error", percent=False, higher=False, short="MAE", digits=3)
R2 = Metric("r2", "explained variance (R²)", hub="r_squared", short="R²")


@dataclass(frozen=True)
class Numbered(Wrapped):
    """Examples of ``source``, each with a target: float32 [n], scaled to -1..1."""

    source: Any
    scaled: NDArray[np.float32]

    @property
    def digest(self) -> str:
        """Return the digest of ``source``."""
        return str(self.source.digest)

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory."""
        return int(self.source.nbytes) + self.scaled.nbytes

    def batch(self, index: Indices, width: int = 0) -> Inputs:
        """Return the inputs at ``index``."""
        inputs: Inputs = self.source.batch(index, width)
        return inputs

    def targets(self, index: Indices, width: int = 0) -> NDArray[np.float32]:
        """Return the scaled targets, float32 [b]."""
        return self.scaled[index]

    def subset(self, index: Indices) -> "Numbered":
        """Return the examples at ``index``, in that order; encoded rows are shared."""
        return Numbered(self.source.subset(index), self.scaled[index])

    def joined(self, others: "Sequence[Numbered]") -> "Numbered":
        """Return these examples and the examples of ``others``, in order."""
        every = (self, *others)
        sources: list[Any] = [one.source for one in every]
        return Numbered(concatenate(sources), np.concatenate([one.scaled for one in every]))


@dataclass(frozen=True)
class NumberEvaluation:
    """The target and the prediction of each example, float64 [n], in order, scaled to 0..1.

    ``loss`` is the sum of squared errors on the scale -1..1; ``span`` is the range of the target.
    """

    loss: float
    true: Values
    predicted: Values
    span: float

    @property
    def tally(self) -> Tally:
        """Return the sums; each is a high and a low part of a whole number of ``STEP``."""
        y, p = self.true, self.predicted
        sums = [y, y * y, p, p * p, y * p, np.abs(p - y), (p - y) ** 2]
        whole = np.rint(np.array([one.sum() for one in sums]) / STEP).astype(np.int64)
        parts = np.stack([whole >> LOW_BITS, whole & ((1 << LOW_BITS) - 1)], axis=1)
        return Tally(self.loss, np.array([[len(y)]], np.int64), parts.reshape(-1))

    def intervals(self, generator: np.random.Generator) -> dict[str, Any]:
        """Return 95 % bootstrap intervals of MAE and R2; {} for fewer than two examples."""
        y, p = self.true, self.predicted
        if len(y) < 2:
            return {}
        sums = redrawn_sums(np.stack([np.abs(p - y), (p - y) ** 2, y, y * y]), generator)
        spread = sums[3] - sums[2] ** 2 / len(y)
        found = {"mae_interval": list(percentile_interval(self.span * sums[0] / len(y)))}
        if (spread > 0).all():
            found["r2_interval"] = list(percentile_interval(1 - sums[1] / spread))
        return found

    def compare(
        self, other: "NumberEvaluation", generator: np.random.Generator, *, name: str, rival: Rival
    ) -> dict[str, Any]:
        """Return the difference of absolute errors to ``other``, in the target's unit.

        Both models predict the same examples.
        """
        errors = [self.span * np.abs(one.predicted - one.true) for one in (self, other)]
        return _verdict(errors[0], errors[1], generator, name, rival).to_json()

    def joined(self, others: "Sequence[NumberEvaluation]") -> "NumberEvaluation":
        """Return one evaluation of the examples of this one and of ``others``, in order."""
        every = (self, *others)
        true, predicted = (
            np.concatenate([getattr(one, key) for one in every]) for key in ("true", "predicted")
        )
        return NumberEvaluation(math.fsum(e.loss for e in every), true, predicted, self.span)

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON values."""
        return {
            **vars(self),
            "true": self.true.tolist(),
            "predicted": self.predicted.tolist(),
        }


@dataclass(frozen=True)
class NumberMeasures:
    """The counts of a job for numbers from ``lowest`` to ``highest``."""

    lowest: float
    highest: float

    classes = 1
    size = 2 * SUMS
    most_parts = 1
    loss_limit = TALLY_LIMIT
    named: tuple[str, ...] = ("numbers",)

    @property
    def span(self) -> float:
        """Return the range of the target, in its unit."""
        return self.highest - self.lowest

    def fits(self, tally: Tally) -> bool:
        """Return whether the tally can be the sums of its number of values between 0 and 1."""
        if tally.more.shape != (self.size,) or (tally.more < 0).any():
            return False
        most = tally.examples + 1e-3 + 2 * STEP * max(tally.examples, 1)
        return bool((_sums(tally) <= most).all())

    def without_few(self, counts: Counts) -> Counts:
        """Return ``counts`` unchanged: they are over all examples together."""
        return counts

    def collect(self, examples: Examples) -> "_Collector":
        """Return a collector of a model's predictions for ``examples``."""
        return _Collector(self, examples)

    def evaluation(self, value: Mapping[str, Any]) -> NumberEvaluation:
        """Return the evaluation that ``to_json`` wrote."""
        true, predicted = (np.array(value[key], np.float64) for key in ("true", "predicted"))
        return NumberEvaluation(value["loss"], true, predicted, value["span"])

    def figures(self, tally: Tally) -> dict[str, Any]:
        """Return MAE, MSE and RMSE in the target's unit, R2, Pearson's r, and the mean ``loss``.

        The loss is on the scaled target. R2 is 0 if all targets are one number. Pearson's r is 0 if
        all targets or all predictions are one number.
        """
        n, (y, yy, p, pp, yp, off, squared) = max(tally.examples, 1), _sums(tally)
        spread, wide = max(yy - y * y / n, 0.0), max(pp - p * p / n, 0.0)
        mse = self.span**2 * squared / n
        known = tally.examples > 0 and spread > n * STEP
        both = math.sqrt(spread * wide)
        return {
            "mae": float(self.span * off / n),
            "r2": float(1 - squared / spread) if known else 0.0,
            "mse": float(mse),
            "rmse": math.sqrt(mse),
            "pearson": float(np.clip((yp - y * p / n) / both, -1, 1)) if both > n * STEP else 0.0,
            "loss": tally.mean_loss,
        }


class _Collector:
    """A collector of predictions; it restores the order of the examples."""

    def __init__(self, measures: NumberMeasures, examples: Examples) -> None:
        self._span = measures.span
        self._true, self._predicted = np.zeros((2, len(examples)))
        self._losses = np.zeros(len(examples))

    def add(self, index: Indices, found: Mapping[str, Any]) -> None:
        """Add a batch: ``true`` and ``predicted`` numbers on the scale -1..1, and ``losses``."""
        self._losses[index] = found["losses"]
        self._true[index] = (np.asarray(found["true"], np.float64) + 1) / 2
        self._predicted[index] = np.clip((np.asarray(found["predicted"], np.float64) + 1) / 2, 0, 1)

    def evaluation(self) -> NumberEvaluation:
        """Return the evaluation of all added examples."""
        return NumberEvaluation(math.fsum(self._losses), self._true, self._predicted, self._span)


class Regression(Task):
    """Predict one number per example, for any modality."""

    target = "number"
    beside = "target"
    keys: Mapping[str, str | float] = MappingProxyType({"lowest": 0.0, "highest": 1.0})
    stored: Mapping[str, str] = MappingProxyType({"target": "float64"})
    metrics = (MAE, R2)
    card_metrics = (
        MAE,
        Metric("rmse", "root mean squared error", percent=False, higher=False, digits=3),
        R2,
        Metric("pearson", "Pearson's r", percent=False, hub="pearsonr", digits=3),
    )
    card_note = "Errors are in the unit of the target. "
    intervals = "The mean absolute error and R² have bootstrap intervals over examples."
    verdicts = (
        '"Helped" and "hurt" need both a paired permutation test below 5 % and a 95 % bootstrap '
        "interval of the difference in absolute error that excludes zero. Both models predict the "
        "same examples; the difference is in the unit of the target."
    )
    differences = Differences(
        "absolute error in the unit of the target, on the site's own test examples: below 0 the "
        "federated model is better. Below it its 95 % interval, by bootstrap",
        ("Error", "Permutation p"),
        points=False,
    )
    use = "predict a number for an example"
    refuses = without_classes(
        "numbers",
        more={
            "domain": (
                "{task} reads no examples without a target",
                "leave training.domain out",
            ),
            "label_smoothing": (
                "{task} has no labels to smooth",
                "leave training.label_smoothing out",
            ),
            "distillation": (
                "a teacher gives a distribution over labels, and {task} has none",
                "leave training.distillation out",
            ),
        },
    )

    def __init__(self, modality: Modality, auto_class: str, pipeline: str) -> None:
        self.modality, self.auto_class, self.pipeline = modality, auto_class, pipeline
        self.name = f"{modality.name}-regression"

    def check_keys(self, keys: Mapping[str, Any]) -> None:
        """Check that the lowest target is below the highest target, and not too far."""
        lowest, highest = float(keys["lowest"]), float(keys["highest"])
        hint = "the range of the target, such as data.lowest = 0 and data.highest = 125"
        if not lowest < highest:
            raise IllegalJob(
                f"data.lowest = {lowest:g} is not below data.highest = {highest:g}", hint
            )
        if highest - lowest > LARGEST_SPAN:
            raise IllegalJob(
                f"data.lowest = {lowest:g} and data.highest = {highest:g} are further apart than "
                f"{LARGEST_SPAN:g}",
                hint,
            )

    def read(self, cell: Cell, reading: Reading) -> dict[str, Any]:
        """Return the number; in a file without types, a text that is a number is accepted."""
        value = read_number(cell)
        if not math.isfinite(value):
            raise DataError("the target is not finite", hint="fill it in or remove the row")
        lowest, highest = (reading.keys.get(key, value) for key in ("lowest", "highest"))
        if not lowest <= value <= highest:
            raise DataError(OUTSIDE.format(lowest, highest), hint=UNIT)
        return {"label": 0, "target": value}

    def write(self, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """Return the number."""
        return {"target": row["target"]}

    def encode(self, rows: Rows, processor: Any, settings: Settings, keep: Keep) -> Numbered:
        """Return one example per row, with its scaled target.

        Raises:
            DataError: a target is outside the job's range.
        """
        lowest, highest = settings.keys["lowest"], settings.keys["highest"]
        targets = np.array(rows.column("target"), np.float64)
        outside = np.flatnonzero((targets < lowest) | (targets > highest))
        if len(outside):
            raise DataError(OUTSIDE.format(lowest, highest), hint=UNIT)
        labels = np.zeros(len(rows), np.int64)
        source = self.modality.encode(rows, labels, processor, settings, keep)
        scaled = 2 * (targets - lowest) / (highest - lowest) - 1
        return Numbered(source, scaled.astype(np.float32))

    def describe_input(self, processor: Processor, settings: Settings) -> str:
        """Return texts about the conversion of inputs, and about the model's output."""
        lowest, highest = settings.keys["lowest"], settings.keys["highest"]
        scale = (
            f"Output: the model gives x from -1 to 1; the target is {lowest:g} + "
            f"{(highest - lowest) / 2:g} * (x + 1), between {lowest:g} and {highest:g}."
        )
        return "\n\n".join(filter(None, [processor.describe(settings), scale]))

    def measures(self, settings: Settings) -> NumberMeasures:
        """Return the measures: sums of targets, predictions and errors."""
        return NumberMeasures(settings.keys["lowest"], settings.keys["highest"])

    def model_options(
        self, config: Mapping[str, Any], labels: Sequence[str], source: str
    ) -> dict[str, Any]:
        """Return the options for a head with one output."""
        return {"num_labels": 1, "problem_type": PROBLEM}

    def knows_head(
        self, config: Mapping[str, Any], named: Sequence[str | None], labels: Sequence[str]
    ) -> bool:
        """Return whether the folder says that its head was trained for a regression.

        One output alone is no evidence: it can be a score of anything.
        """
        return config.get("problem_type") == PROBLEM

    def usage(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return the options for a head with one output; the adapter then replaces it."""
        return head_usage(1)


def _sums(tally: Tally) -> Values:
    """Return the sums of a tally, float64 [SUMS]."""
    high, low = tally.more.reshape(SUMS, 2).T
    return np.asarray((high * (1 << LOW_BITS) + low) * STEP, np.float64)


def _verdict(
    ours: Values, theirs: Values, generator: np.random.Generator, name: str, rival: Rival
) -> Verdict:
    """Compare the absolute errors of two models on the same examples, float64 [n]."""
    if not len(ours):
        return Verdict("unknown", not_known(name, "examples"), 0.0, None, 1.0)
    gaps, interval, p_value = ours - theirs, None, 1.0
    if len(gaps) > 1:
        interval = percentile_interval(redrawn_sums(gaps[None], generator)[0] / len(gaps))
        p_value = permutation_test(gaps, generator)
    outcome = judge(interval, p_value, higher=False)
    first, second = (f"{one.mean():.3g}" for one in (ours, theirs))
    span = "" if interval is None else f", 95 % interval {interval[0]:+.3g} to {interval[1]:+.3g}"
    examples = numbered(len(gaps), "1 example", "examples")
    sentence = tell(
        outcome,
        name=name,
        rival=rival,
        shown=(f"{MAE.name} {first}", second),
        facts=f"difference {gaps.mean():+.3g}{span}, {examples}",
        p_value=p_value,
    )
    return Verdict(outcome, sentence, float(gaps.mean()), interval, p_value)
