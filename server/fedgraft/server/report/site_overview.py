"""The results of a run's sites in one sentence, seven quantiles and a few names.

People read ten sites one by one, but not thousands. For many sites, the report and the terminal
show the distribution of each model's headline metric, and the sites that federating changed most.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from fedgraft.common.metrics.metric import Metric
from fedgraft.server.report.values import Record, outcome_of, read_estimate, read_record

__all__ = ["MANY_SITES", "QUANTILES", "Spread", "headline", "most_moved", "spread"]

MANY_SITES = 100  # above, one row per site is too long to read
QUANTILES = {
    "min": 0.0,
    "5 %": 0.05,
    "25 %": 0.25,
    "median": 0.5,
    "75 %": 0.75,
    "95 %": 0.95,
    "max": 1.0,
}


@dataclass(frozen=True)
class Spread:
    """A metric of one model over ``sites`` sites; ``quantiles`` are in the order of QUANTILES."""

    sites: int
    quantiles: tuple[float, ...]
    mean: float


def spread(sites: Sequence[Record], model: str, key: str) -> Spread | None:
    """Return the distribution of the model's metric ``key`` over the sites' own test sets.

    It is None if no site has the metric. Every site counts once, regardless of the number of its
    test examples. Between two sites, a quantile is interpolated linearly, which is numpy's default.
    """
    found = (read_estimate(read_record(site, model), key).value for site in sites)
    values = sorted(value for value in found if value is not None)
    if not values:
        return None
    quantiles = tuple(_quantile(values, share) for share in QUANTILES.values())
    return Spread(len(values), quantiles, fmean(values))


def _quantile(values: Sequence[float], share: float) -> float:
    at, rest = divmod(share * (len(values) - 1), 1)
    low, high = values[int(at)], values[min(int(at) + 1, len(values) - 1)]
    return low + rest * (high - low)


def most_moved(
    sites: Sequence[Record], count: int, metric: Metric
) -> tuple[list[Record], list[Record]]:
    """Return up to ``count`` sites that gained most by federating, and as many that lost most.

    The gain is that of ``metric`` on the site's own test set, federated against local only. Sites
    with a clear verdict come before the others, because a site with one test example can change by
    100 points by chance alone.
    """
    known = [(gain, site) for site in sites if (gain := _gain(site, metric)) is not None]
    gained = [(outcome_of(site) != "helped", -gain, site) for gain, site in known if gain > 0]
    lost = [(outcome_of(site) != "hurt", gain, site) for gain, site in known if gain < 0]
    most = [sorted(moved, key=lambda one: one[:2])[:count] for moved in (gained, lost)]
    return [one[2] for one in most[0]], [one[2] for one in most[1]]


def _gain(site: Record, metric: Metric) -> float | None:
    """Return how much better the federated model is than the site's own; below 0 if it is worse."""
    ours, alone = (
        read_estimate(read_record(site, model), metric.key).value
        for model in ("federated", "local_only")
    )
    if ours is None or alone is None:
        return None
    return ours - alone if metric.higher else alone - ours


def headline(sites: Sequence[Record]) -> str:
    """Return one sentence about whether federating was worth it, from the sites' verdicts."""
    tally = Counter(outcome_of(site) for site in sites)
    compared = len(sites) - tally["unknown"]
    if not compared:
        return (
            "Whether federating was worth it is not known: no site's federated model was compared "
            "with a model of its own."
        )
    helped, hurt, unclear = tally["helped"], tally["hurt"], tally["unclear"]
    if len(sites) == 1:
        return {
            "helped": "Federating helped the one site of this run.",
            "hurt": "Federating hurt the one site of this run.",
        }.get(
            outcome_of(sites[0]),
            "The test examples of the one site cannot tell if federating helped.",
        )
    if not helped and not hurt:
        return (
            f"The test examples of {compared:,} sites cannot tell if federating helped any of them."
        )
    lost = f"{hurt:,}" if hurt else "none"
    parts = [f"Federating helped {helped:,} of {len(sites):,} sites and hurt {lost}"]
    if unclear:
        parts.append(f"for {unclear:,} the test examples cannot tell")
    if tally["unknown"]:
        parts.append(f"{tally['unknown']:,} could not be compared")
    return "; ".join(parts) + "."
