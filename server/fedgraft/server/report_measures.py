"""The report's tables of ranking and calibration, and of how well each group is served."""

from collections.abc import Sequence

from fedgraft.server.report_figures import POOLED
from fedgraft.server.report_values import Record, read_number, read_record
from fedgraft.server.site_overview import MANY_SITES

__all__ = ["measure_facts"]

BY_SITE = ("federated", "local_only", "central", "zero_shot")


def measure_facts(final: Record, sites: Sequence[Record]) -> dict[str, object]:
    """What a job counted beside the confusion matrix, empty where it counted nothing.

    ``scored`` are models with AUROC on the pooled test set, ``site_scored`` those of single sites;
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
        "group_names": list(names),
        "group_rows": rows,
    }


def _ranked(metrics: Record) -> bool:
    return read_number(metrics.get("auroc")) is not None
