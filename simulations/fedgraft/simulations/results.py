"""From measurements to the summary that the table, ``--json`` and the report all show."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedgraft.client.evaluation import Evaluation
from fedgraft.common.files import write_text
from fedgraft.common.metrics import Tally
from fedgraft.common.seeds import numpy_generator
from fedgraft.common.verdicts import macro_f1_interval, verdict, wilson_interval
from fedgraft.simulations.compare import Measured
from fedgraft.simulations.partition import SimulatedSite

__all__ = ["COMPARISONS", "final_metrics", "load_measured", "save_measured", "site_results"]

COMPARISONS = ("federated", "central", "local_only", "head_only", "zero_shot")


def final_metrics(measured: Mapping[str, Measured | None], seed: int) -> dict[str, Any]:
    """Every model on the pooled test set; for ``local_only`` the mean over the sites' models."""
    final: dict[str, Any] = {}
    for name in COMPARISONS:
        result = measured.get(name)
        if result is None:
            final[name] = None
        elif result.models is not None:
            final[name] = _mean_of_models(result.models)
        elif (pooled := result.pooled()) is not None and pooled.examples:
            final[name] = _metrics(pooled, seed, "pooled", name)
        else:
            final[name] = None
    return final


def site_results(
    sites: Sequence[SimulatedSite], measured: Mapping[str, Measured | None], seed: int
) -> list[dict[str, Any]]:
    """Every model on each site's own test set, and whether federating helped that site."""
    return [_site(site, index, measured, seed) for index, site in enumerate(sites)]


def _site(
    site: SimulatedSite, index: int, measured: Mapping[str, Measured | None], seed: int
) -> dict[str, Any]:
    own: dict[str, Evaluation | None] = {}
    for name in (*COMPARISONS, "federated_tuned"):
        result = measured.get(name)
        own[name] = result.own[index] if result is not None else None
    metrics = {
        name: _metrics(value.tally, seed, site.name, name) if value and len(value.true) else None
        for name, value in own.items()
    }
    federated, alone = own["federated"], own["local_only"]
    if federated is not None and alone is not None:
        judged = verdict(federated.correct, alone.correct, name=site.name)
        sentence, outcome = judged.sentence, judged.outcome
        if (tuned := own["federated_tuned"]) is not None:
            sentence += f" After a short fine-tune there: {100 * tuned.tally.accuracy:.1f} %."
    else:
        could = "could not be trained" if measured.get("local_only") else "was not run"
        sentence = f"{site.name} has no model of its own to compare with: local_only {could}."
        outcome = "unknown"
    return {
        "name": site.name,
        "examples": site.examples,
        "test_examples": site.test_examples,
        "classes": int(np.count_nonzero(site.classes)),
        "shift": site.shift or None,
        **metrics,
        "verdict": sentence,
        "outcome": outcome,
    }


def _metrics(tally: Tally, seed: int, *purpose: str) -> dict[str, Any]:
    generator = numpy_generator(seed, "bootstrap", *purpose)
    return {
        **tally.summary(),
        "accuracy_interval": list(wilson_interval(tally.correct, tally.examples)),
        "macro_f1_interval": list(macro_f1_interval(tally.confusion, generator)),
    }


def _mean_of_models(summaries: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """Mean of several models' metrics. No interval: models of ten sites are not draws of one."""
    if not summaries:
        return None
    mean = {key: float(np.mean([one[key] for one in summaries])) for key in summaries[0]}
    return {**mean, "best_accuracy": max(one["accuracy"] for one in summaries)}


def save_measured(path: Path, measured: Measured | None) -> None:
    """Keep a comparison, so that a resumed run need not do it again.

    As JSON: two labels a test example. A confusion matrix a site would be thousands of zeros.
    """
    value = measured and {
        "own": [one and _to_json(one) for one in measured.own],
        "models": measured.models,
    }
    write_text(path, json.dumps(value, separators=(",", ":")))


def load_measured(path: Path) -> Measured | None:
    """What ``save_measured`` kept."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if value is None:
        return None
    models = value["models"]
    own = tuple(one and _from_json(one) for one in value["own"])
    return Measured(own, None if models is None else tuple(models))


def _to_json(one: Evaluation) -> dict[str, Any]:
    return {**vars(one), "true": one.true.tolist(), "predicted": one.predicted.tolist()}


def _from_json(value: Mapping[str, Any]) -> Evaluation:
    true, predicted = (np.array(value[key], np.int64) for key in ("true", "predicted"))
    return Evaluation(value["loss"], true, predicted, value["classes"])
