"""Make the summary of the measurements that the table, ``--json`` and the report show."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedgraft.client.results.judge import figures, judge, outcome_of
from fedgraft.common.files import write_text
from fedgraft.common.metrics.evaluation import Evaluation, Measures
from fedgraft.common.metrics.metric import Metric
from fedgraft.common.tasks import Task
from fedgraft.simulations.baselines.compare import Measured
from fedgraft.simulations.data.partition import SimulatedSite

__all__ = ["COMPARISONS", "final_metrics", "load_measured", "save_measured", "site_results"]

COMPARISONS = ("federated", "central", "local_only", "head_only", "zero_shot")


def final_metrics(
    measured: Mapping[str, Measured | None], seed: int, measures: Measures, task: Task
) -> dict[str, Any]:
    """Return the metrics of every model on the pooled test set.

    For ``local_only`` they are the mean over the sites' models.
    """
    final: dict[str, Any] = {}
    for name in COMPARISONS:
        result = measured.get(name)
        if result is None:
            final[name] = None
        elif result.models is not None:
            final[name] = _mean_of_models(result.models, task.share.key)
        elif (pooled := result.pooled()) is not None and pooled.tally.examples:
            final[name] = figures(pooled, measures, seed, "pooled", name)
        else:
            final[name] = None
    return final


def site_results(
    sites: Sequence[SimulatedSite],
    measured: Mapping[str, Measured | None],
    seed: int,
    measures: Measures,
    task: Task,
) -> list[dict[str, Any]]:
    """Return the metrics of every model on each site's own test set, and each site's verdict.

    The verdict says whether federating helped that site.
    """
    return [
        _site(
            site,
            _own(measured, index),
            seed,
            measures,
            task.metrics[0],
            trained_alone=measured.get("local_only") is not None,
        )
        for index, site in enumerate(sites)
    ]


def _own(measured: Mapping[str, Measured | None], index: int) -> dict[str, Evaluation | None]:
    own: dict[str, Evaluation | None] = {}
    for name in (*COMPARISONS, "federated_tuned"):
        result = measured.get(name)
        own[name] = result.own[index] if result is not None else None
    return own


def _site(
    site: SimulatedSite,
    own: Mapping[str, Evaluation | None],
    seed: int,
    measures: Measures,
    metric: Metric,
    *,
    trained_alone: bool,
) -> dict[str, Any]:
    metrics = {
        name: figures(value, measures, seed, site.name, name)
        if value and value.tally.examples
        else None
        for name, value in own.items()
    }
    could = "could not be trained" if trained_alone else "was not run"
    missing = f"{site.name} has no model of its own to compare with: local_only {could}."
    judged = judge(own, seed, name=site.name)
    sentence, outcome = outcome_of(judged, missing=missing)
    if (tuned := own["federated_tuned"]) is not None and "local_only" in judged:
        came = metric.text(measures.figures(tuned.tally)[metric.key])
        said = "" if metric.right else f"{metric.name} "
        sentence += f" After a short fine-tune there: {said}{came}."
    return {
        "name": site.name,
        "examples": site.examples,
        "test_examples": site.test_examples,
        "classes": int(np.count_nonzero(site.classes)),
        "shift": site.shift or None,
        **metrics,
        "comparisons": judged,
        "verdict": sentence,
        "outcome": outcome,
    }


def _mean_of_models(summaries: Sequence[Mapping[str, float]], share: str) -> dict[str, Any] | None:
    """Return the mean of several models' metrics.

    There is no interval, because the models of ten sites are not draws of one model.
    """
    if not summaries:
        return None
    mean = {key: float(np.mean([one[key] for one in summaries])) for key in summaries[0]}
    return {**mean, f"best_{share}": max(one[share] for one in summaries)}


def save_measured(path: Path, measured: Measured | None) -> None:
    """Save a comparison, so that a resumed run need not repeat it.

    The file is JSON with two labels per test example, or three sums per block of text. A confusion
    matrix per site would be thousands of zeros.
    """
    value = measured and {
        "own": [one and one.to_json() for one in measured.own],
        "models": measured.models,
    }
    write_text(path, json.dumps(value, separators=(",", ":")))


def load_measured(path: Path, measures: Measures) -> Measured | None:
    """Return the comparison that ``save_measured`` saved."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if value is None:
        return None
    models = value["models"]
    own = tuple(one and measures.evaluation(one) for one in value["own"])
    return Measured(own, None if models is None else tuple(models))
