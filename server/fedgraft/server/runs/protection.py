"""The protection of a run's updates, from its rounds' records, for summary, report and card."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedgraft.common.config.job import Job
from fedgraft.common.secagg.transcript import PROTOCOL

__all__ = ["protection_facts"]

RANGES = ("cohort", "survivors", "colluders", "degree", "share_threshold", "sign_threshold")


def protection_facts(job: Job, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return protocol, thresholds and coding; numbers that can differ by round are [least, most].

    ``error_bound`` is the largest error of a coordinate of the mean update that is possible in any
    round. ``clipped`` is the largest mean share of clipped coordinates in any round.
    """
    if not job.privacy.secure_aggregation.enabled:
        return {"protocol": "none"}
    rounds = [line["masked"] for line in history if isinstance(line.get("masked"), Mapping)]
    coding = job.privacy.secure_aggregation.coding(by_examples=True)
    facts: dict[str, Any] = {
        "protocol": PROTOCOL,
        "rounds": len(rounds),
        "ring_bits": coding.ring_bits,
        "value_bits": coding.value_bits,
        "clip": coding.clip,
        "clipped": max((line["clipped"] for line in rounds), default=None),
        "error_bound": max((line["error_bound"] for line in rounds), default=None),
    }
    for name in RANGES:
        values = [line[name] for line in rounds]
        facts[name] = [min(values), max(values)] if values else None
    return facts
