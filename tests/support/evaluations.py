"""Rows without a file, encoded or measured, with what comes of it told apart by its kind."""

from typing import Any

import datasets

from fedgraft.client.data.cache import Keeper, Store
from fedgraft.client.data.rows import Columns
from fedgraft.client.model.batched_model import Stack
from fedgraft.client.training.evaluate import measure
from fedgraft.common.config.job import Job
from fedgraft.common.examples import Examples
from fedgraft.common.layout import Layout, Vector
from fedgraft.common.metrics.evaluation import Measures
from fedgraft.common.metrics.label_evaluation import LabelEvaluation
from fedgraft.common.metrics.part_evaluation import PartEvaluation

__all__ = ["NOWHERE", "encoded_by", "measured_labels", "measured_parts", "text_rows"]

NOWHERE = Keeper(None, "")  # nothing is kept


def text_rows(texts: list[str], **beside: list[Any]) -> Columns:
    """Rows of texts, and what stands beside them, as encoders ask for them."""
    return Columns(datasets.Dataset.from_dict({"text": texts, **beside}))


def encoded_by(
    job: Job, processor: Any, rows: Columns, store: Store | None = None, key: str = ""
) -> Examples:
    """``rows`` as the task of ``job`` encodes them."""
    return job.task.encode(rows, processor, job.settings, Keeper(store, key))


def measured_labels(
    stack: Stack, trained: Layout, vector: Vector, examples: Examples, measures: Measures
) -> LabelEvaluation:
    """``measure`` where labels are predicted."""
    found = measure(stack, trained, vector, examples, measures=measures)
    assert isinstance(found, LabelEvaluation)
    return found


def measured_parts(
    stack: Stack, trained: Layout, vector: Vector, examples: Examples, measures: Measures
) -> PartEvaluation:
    """``measure`` where tokens or patches are predicted."""
    found = measure(stack, trained, vector, examples, measures=measures)
    assert isinstance(found, PartEvaluation)
    return found
