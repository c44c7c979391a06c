"""The report's tables: differences, ranking and calibration, and metrics of each group."""

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
    """Return the measures beside the confusion matrix; lists are empty if nothing was measured.

    ``scored`` are the models with AUROC on the pooled test set, ``site_scored`` those with AUROC at
    single sites. ``difference_rows`` compare the federated model with other models, site by site.
    ``group_rows`` are (examples' owner, model, metrics), pooled first, then site by site. With more
    than ``MANY_SITES`` sites, there are no rows site by site.
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
    """Yield a row for every model that the federated model was compared with at ``site``."""
    for rival in RIVALS:
        found = read_record(read_record(site, "comparisons"), rival)
        if found:
            # In the task's unit: for labels in accuracy, for tokens in nats per token.
            ends = {
                "difference": found.get("difference"),
                "difference_interval": found.get("interval"),
            }
            gap = read_estimate(ends, "difference")
            f1 = read_estimate(found, "macro_f1_difference")
            yield {
                "site": str(site.get("name")),
                "rival": rival,
                "difference": gap.value,
                "difference_interval": gap.interval,
                "p_value": found.get("p_value"),
                "macro_f1": f1.value,
                "macro_f1_interval": f1.interval,
                "outcome": outcome_of(found),
            }


def _ranked(metrics: Record) -> bool:
    return read_number(metrics.get("auroc")) is not None
