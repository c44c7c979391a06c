"""The report's tables of differences, of ranking and calibration, and of each group."""

from collections.abc import Iterator, Sequence

from fedgraft.server.report.figures import POOLED
from fedgraft.server.report.site_overview import MANY_SITES
from fedgraft.server.report.values import (
    Record,
    outcome_of,
    read_estimate,
    read_number,
    read_record,
)

__all__ = ["measure_facts"]

RIVALS = ("local_only", "zero_shot")
BY_SITE = ("federated", "local_only", "central", "zero_shot")


def measure_facts(final: Record, sites: Sequence[Record]) -> dict[str, object]:
    """What a job counted beside the confusion matrix, empty where it counted nothing.

    ``scored`` are models with AUROC on the pooled test set, ``site_scored`` those of single sites;
    ``difference_rows`` are the federated model's beside each other one, site by site, and
    ``group_rows`` are (whose examples, model, metrics), pooled first, then site by site. Of more
    than ``MANY_SITES`` sites there are no rows site by site.
    """
    few = sites if len(sites) <= MANY_SITES else []
    pooled = [(model, read_record(final, model)) for model in POOLED]
    rows = [("all sites", model, found) for model, found in pooled if found.get("groups")]
    for site in few:
        found = read_record(site, "federated")
        if found.get("groups"):
            rows.append((str(site.get("name")), "federated", found))
    names: dict[str, None] = {}
    for *_, found in rows:
        names |= dict.fromkeys(str(name) for name in read_record(found, "groups"))
    by_site = [model for model in BY_SITE if any(_ranked(read_record(site, model)) for site in few)]
    return {
        "scored": [model for model, found in pooled if _ranked(found)],
        "site_scored": by_site,
        "few_sites": few,
        "difference_rows": [row for site in few for row in _differences(site)],
        "group_names": list(names),
        "group_rows": rows,
    }


def _differences(site: Record) -> Iterator[dict[str, object]]:
    """One row for every model that the federated one was held against at ``site``."""
    for rival in RIVALS:
        found = read_record(read_record(site, "comparisons"), rival)
        if found:
            # In accuracy, or of tokens in loss.
            accuracy = {"of": found.get("difference"), "of_interval": found.get("interval")}
            gap = read_estimate(accuracy, "of")
            f1 = read_estimate(found, "macro_f1_difference")
            yield {
                "site": str(site.get("name")),
                "rival": rival,
                "accuracy": gap.value,
                "accuracy_interval": gap.interval,
                "p_value": found.get("p_value"),
                "macro_f1": f1.value,
                "macro_f1_interval": f1.interval,
                "outcome": outcome_of(found),
            }


def _ranked(metrics: Record) -> bool:
    return read_number(metrics.get("auroc")) is not None
