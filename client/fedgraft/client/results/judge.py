"""Figures of one model, and what federating was worth beside every model a site has without it.

The same words and numbers for a site of a simulation and for a real one after the run.
"""

from collections.abc import Mapping
from typing import Any

from fedgraft.common.metrics.evaluation import Evaluation, Measures
from fedgraft.common.metrics.verdict import Outcome, Rival
from fedgraft.common.seeds import numpy_generator

__all__ = ["RIVALS", "figures", "judge", "outcome_of"]

RIVALS: tuple[Rival, ...] = ("local_only", "zero_shot")


def figures(one: Evaluation, measures: Measures, seed: int, *purpose: str) -> dict[str, Any]:
    """All that is said of a model on some test examples, fractions 0..1, losses in nats."""
    generator = numpy_generator(seed, "bootstrap", *purpose)
    return {**measures.figures(one.tally), **one.intervals(generator)}


def judge(own: Mapping[str, Evaluation | None], seed: int, *, name: str) -> dict[str, Any]:
    """The federated model of ``own`` against each of ``RIVALS`` that is there, example by example.

    For each what ``Evaluation.compare`` gives: outcome, sentence, difference with interval and
    p-value. Differences are federated minus the other.
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
    """The sentences of what ``judge`` found, and whether federating helped beside a site alone.

    ``missing`` is said where there is no model of the site's own.
    """
    alone = judged.get("local_only")
    first = alone["sentence"] if alone else missing
    others = [one["sentence"] for rival, one in judged.items() if rival != "local_only"]
    return " ".join([first, *others]), alone["outcome"] if alone else "unknown"
