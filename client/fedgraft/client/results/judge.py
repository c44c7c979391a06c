"""Figures of one model, and what federating was worth beside every model a site has without it.

The same words and numbers for a site of a simulation and for a real one after the run.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from fedgraft.client.training.evaluate import Measured, PartEvaluation
from fedgraft.common.metrics.label_outcome import (
    Outcome,
    Rival,
    macro_f1_difference,
    macro_f1_interval,
    verdict,
    wilson_interval,
)
from fedgraft.common.metrics.measures import Measures
from fedgraft.common.metrics.part_outcome import block_verdict, part_intervals
from fedgraft.common.seeds import numpy_generator

__all__ = ["RIVALS", "figures", "judge", "outcome_of"]

RIVALS: tuple[Rival, ...] = ("local_only", "zero_shot")


def figures(one: Measured, measures: Measures, seed: int, *purpose: str) -> dict[str, Any]:
    """All that is said of a model on some test examples, fractions 0..1, losses in nats."""
    generator, tally = numpy_generator(seed, "bootstrap", *purpose), one.tally
    if isinstance(one, PartEvaluation):
        intervals = part_intervals(one.losses, one.right, one.counted, generator, one.target)
        return {**measures.figures(tally), **intervals}
    return {
        **measures.figures(tally),
        "accuracy_interval": list(wilson_interval(tally.correct, tally.examples)),
        "macro_f1_interval": list(macro_f1_interval(tally.confusion, generator)),
    }


def judge(own: Mapping[str, Measured | None], seed: int, *, name: str) -> dict[str, Any]:
    """The federated model of ``own`` against each of ``RIVALS`` that is there, example by example.

    For each: outcome, sentence, difference in accuracy with interval and p-value (``Verdict``), and
    ``macro_f1_difference`` with its paired bootstrap interval. Differences are federated minus the
    other, fractions -1..1. Of tokens or patches: in loss (``BlockVerdict``).
    """
    federated = own.get("federated")
    found: dict[str, Any] = {}
    for rival in RIVALS:
        other = own.get(rival)
        if federated is None or other is None:
            continue
        generator = numpy_generator(seed, "bootstrap", name, "federated", rival)
        if isinstance(federated, PartEvaluation):
            found[rival] = _judge_parts(federated, other, generator, name, rival)
            continue
        assert not isinstance(other, PartEvaluation)  # noqa: S101  # both are of one task
        judged = verdict(federated.correct, other.correct, name=name, rival=rival)
        gap, interval = macro_f1_difference(
            federated.true, federated.predicted, other.predicted, generator=generator
        )
        found[rival] = {
            **asdict(judged),
            "interval": list(judged.interval),
            "macro_f1_difference": gap,
            "macro_f1_difference_interval": list(interval),
        }
    return found


def _judge_parts(
    federated: PartEvaluation,
    other: Measured,
    generator: np.random.Generator,
    name: str,
    rival: Rival,
) -> dict[str, Any]:
    assert isinstance(other, PartEvaluation)  # noqa: S101  # both are of one task
    judged = block_verdict(
        federated.losses,
        other.losses,
        federated.counted,
        name=name,
        generator=generator,
        rival=rival,
        target=federated.target,
    )
    return {**asdict(judged), "interval": judged.interval and list(judged.interval)}


def outcome_of(judged: Mapping[str, Any], *, missing: str) -> tuple[str, Outcome]:
    """The sentences of what ``judge`` found, and whether federating helped beside a site alone.

    ``missing`` is said where there is no model of the site's own.
    """
    alone = judged.get("local_only")
    first = alone["sentence"] if alone else missing
    others = [one["sentence"] for rival, one in judged.items() if rival != "local_only"]
    return " ".join([first, *others]), alone["outcome"] if alone else "unknown"
