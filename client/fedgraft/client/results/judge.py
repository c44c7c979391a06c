"""Figures of one model, and the value of federating beside each model that a site has without it.

A site of a simulation and a real site after the run get the same words and numbers.
"""

from collections.abc import Mapping
from typing import Any

from fedgraft.common.metrics.evaluation import Evaluation, Measures
from fedgraft.common.metrics.verdict import Outcome, Rival
from fedgraft.common.seeds import numpy_generator

__all__ = ["RIVALS", "figures", "judge", "outcome_of"]

RIVALS: tuple[Rival, ...] = ("local_only", "zero_shot")


def figures(one: Evaluation, measures: Measures, seed: int, *purpose: str) -> dict[str, Any]:
    """Return all figures of a model on some test examples, by the keys of the task's metrics.

    Shares are 0..1; ``loss`` is in the unit of the task's objective.
    """
    generator = numpy_generator(seed, "bootstrap", *purpose)
    return {**measures.figures(one.tally), **one.intervals(generator)}


def judge(own: Mapping[str, Evaluation | None], seed: int, *, name: str) -> dict[str, Any]:
    """Compare the federated model of ``own`` with each of ``RIVALS`` in it, example by example.

    Return for each rival the result of ``Evaluation.compare``: outcome, sentence, difference with
    interval and p-value. Differences are federated minus the other.
    """
    federated = own.get("federated")
    found: dict[str, Any] = {}
    for rival in RIVALS:
        other = own.get(rival)
        if federated is None or other is None:
            continue
        generator = numpy_generator(seed, "bootstrap", name, "federated", rival)
        found[rival] = federated.compare(other, generator, name=name, rival=rival)
    return found


def outcome_of(judged: Mapping[str, Any], *, missing: str) -> tuple[str, Outcome]:
    """Return the sentences of ``judge``, and whether federating helped beside training alone.

    ``missing`` is the first sentence if the site has no model of its own.
    """
    alone = judged.get("local_only")
    first = alone["sentence"] if alone else missing
    others = [one["sentence"] for rival, one in judged.items() if rival != "local_only"]
    return " ".join([first, *others]), alone["outcome"] if alone else "unknown"
