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
        if result is None or not result.pooled or not result.pooled[0].examples:
            final[name] = None
        elif len(result.pooled) == 1 and name != "local_only":
            final[name] = _metrics(result.pooled[0], seed, "pooled", name)
        else:
            final[name] = _mean_of_models(result.pooled)
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
        name: _metrics(value.tally, seed, site.name, name) if value and len(value.correct) else None
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


def _mean_of_models(tallies: Sequence[Tally]) -> dict[str, Any]:
    """Mean of several models' metrics. No interval: models of ten sites are not draws of one."""
    summaries = [tally.summary() for tally in tallies]
    mean = {key: float(np.mean([one[key] for one in summaries])) for key in summaries[0]}
    return {**mean, "best_accuracy": max(one["accuracy"] for one in summaries)}


def save_measured(path: Path, measured: Measured | None) -> None:
    """Keep a comparison, so that a resumed run need not do it again."""
    if measured is None:
        write_text(path, "null")
        return
    value = {
        "own": [
            None
            if one is None
            else {"tally": _to_json(one.tally), "correct": one.correct.astype(int).tolist()}
            for one in measured.own
        ],
        "pooled": [_to_json(tally) for tally in measured.pooled],
    }
    write_text(path, json.dumps(value))


def load_measured(path: Path) -> Measured | None:
    """What ``save_measured`` kept."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if value is None:
        return None
    own = tuple(
        None
        if one is None
        else Evaluation(_from_json(one["tally"]), np.array(one["correct"], bool))
        for one in value["own"]
    )
    return Measured(own, tuple(_from_json(tally) for tally in value["pooled"]))


def _to_json(tally: Tally) -> dict[str, Any]:
    return {"loss": tally.loss, "confusion": tally.confusion.tolist()}


def _from_json(value: Mapping[str, Any]) -> Tally:
    return Tally(value["loss"], np.array(value["confusion"], np.int64))
