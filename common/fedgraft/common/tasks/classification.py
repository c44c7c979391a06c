"""Classification: predict one of the job's labels for each text, image, recording or clip."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedgraft.common.encoding import Keep, Rows, Settings
from fedgraft.common.examples import IGNORED, Examples
from fedgraft.common.metrics.measures import LabelMeasures
from fedgraft.common.metrics.metric import Metric
from fedgraft.common.modalities import Modality
from fedgraft.common.tasks.base import Cell, Differences, Reading, Task
from fedgraft.common.tasks.labels import head_usage, label_index, label_options
from fedgraft.common.tasks.refusals import other_augmentations

__all__ = ["Classification"]

ACCURACY = Metric("accuracy", "accuracy", right=True)
MACRO_F1 = Metric("macro_f1", "macro F1", hub="f1", short="F1")


class Classification(Task):
    """Predict one label per example, for any modality."""

    target = "label"
    beside = "label"
    labelled = wants_labels = True
    metrics = (ACCURACY, MACRO_F1)
    card_metrics = (
        ACCURACY,
        MACRO_F1,
        Metric("weighted_f1", "weighted F1", hub="f1"),
        Metric("balanced_accuracy", "balanced accuracy", hub="accuracy"),
        Metric("auroc", "AUROC", hub="roc_auc"),
        Metric("calibration_error", "calibration error", hub="expected_calibration_error"),
    )
    intervals = (
        "Accuracy has Wilson intervals; macro F1 has bootstrap intervals. Macro F1 is the mean F1 "
        "over the labels that are true or predicted, as in scikit-learn."
    )
    verdicts = (
        '"Helped" and "hurt" need both an exact McNemar test below 5 % and a 95 % interval of the '
        "paired difference (Newcombe 1998) that excludes zero. Because both models answer the same "
        "examples, two overlapping intervals in the plot can still be a clear difference."
    )
    differences = Differences(
        "in points, on the site's own test examples. Below each its 95 % interval: of accuracy "
        "after Newcombe, of macro F1 by paired bootstrap",
        ("Accuracy", "McNemar p", "Macro F1"),
        points=True,
    )
    use = "choose one of the labels above for an example"

    def __init__(self, modality: Modality, auto_class: str) -> None:
        self.modality, self.auto_class = modality, auto_class
        self.name = self.pipeline = f"{modality.name}-classification"
        self.refuses = other_augmentations(modality)

    def read(self, cell: Cell, reading: Reading) -> dict[str, Any]:
        """Return the index of the label; ``IGNORED`` if the rows have no labels."""
        if not reading.labelled:
            return {"label": IGNORED}
        index = label_index(cell.beside, reading, typed=cell.typed)
        return {"label": index}

    def write(self, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """Return the label's name."""
        return {"label": labels[row["label"]]}

    def encode(self, rows: Rows, processor: Any, settings: Settings, keep: Keep) -> Examples:
        """Return one example per row, with its label and its group."""
        labels = np.array(rows.column("label"), np.int64)
        examples = self.modality.encode(rows, labels, processor, settings, keep)
        if settings.groups:
            return examples.with_groups(np.array(rows.column("group"), np.int64))
        return examples

    def measures(self, settings: Settings) -> LabelMeasures:
        """Return the confusion matrix and the other counts that the job asks for."""
        return LabelMeasures(
            len(settings.labels),
            settings.score_bins,
            settings.groups,
            settings.min_group,
            settings.heads,
        )

    def model_options(
        self, config: Mapping[str, Any], labels: Sequence[str], source: str
    ) -> dict[str, Any]:
        """Return the labels and their number."""
        return label_options(labels)

    def usage(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return the options for a head with one output per label; the adapter then replaces it."""
        return head_usage(len(labels))
