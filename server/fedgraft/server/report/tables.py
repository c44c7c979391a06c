"""The report's tables: all rows if a person can read them, otherwise a selection that says so.

Therefore a report of ten thousand sites over hundreds of rounds is still small enough for mail. The
omitted rows are in ``summary.json`` and ``metrics.jsonl`` beside the report.
"""

import math
from collections import Counter, deque
from collections.abc import Sequence
from statistics import fmean

from fedgraft.common.metrics.metric import Metric
from fedgraft.server.report.plots import MODELS
from fedgraft.server.report.site_overview import MANY_SITES, QUANTILES, most_moved, spread
from fedgraft.server.report.values import (
    OUTCOMES,
    Record,
    each_drop,
    outcome_of,
    read_column,
    read_estimate,
    read_number,
    read_record,
)

__all__ = ["drop_tables", "round_table", "site_tables", "total_traffic"]

SITE_MODELS = ("federated", "federated_tuned", "local_only", "zero_shot", "head_only", "central")
LISTED_SITES = 8
MOVED_SITES = 20  # sites that gained most, and as many that lost most
MANY_ROUNDS = 100
LAST_DROPS = 100
LISTED_REASONS = 20


def site_tables(sites: Sequence[Record], metric: Metric) -> dict[str, object]:
    """Return the site table: rows, columns, means of ``metric``, and sites by outcome.

    With more than ``MANY_SITES`` sites, the table has only the sites that changed most, in two
    ``site_parts``. Then ``spreads`` by model summarise all sites; for fewer sites they are empty.
    """
    means = {}
    for model in SITE_MODELS:
        found = [read_estimate(read_record(site, model), metric.key).value for site in sites]
        if known := [value for value in found if value is not None]:
            means[model] = fmean(known)
    many = len(sites) > MANY_SITES
    gained, lost = most_moved(sites, MOVED_SITES, metric) if many else ([], [])
    parts = [("Gained most", gained), ("Lost most", lost)] if many else [("", sites)]
    groups = {one: [site for site in sites if outcome_of(site) == one] for one in OUTCOMES}
    worst = most_moved(groups["hurt"], LISTED_SITES, metric)[1] if many else []
    return {
        "sites": _rows(sites),
        "site_parts": [(heading, _rows(chosen)) for heading, chosen in parts if chosen],
        "sites_left_out": len(sites) - len(gained) - len(lost) if many else 0,
        "spreads": {model: spread(sites, model, metric.key) for model in means} if many else {},
        "quantiles": list(QUANTILES),
        "site_absent": [MODELS[model].name for model in SITE_MODELS if model not in means],
        "site_means": means,
        "site_shifts": any(site.get("shift") for site in sites),
        "groups": {one: _rows(group) for one, group in groups.items()},
        "hurt": _rows(worst or groups["hurt"][:LISTED_SITES]),
        "listed": LISTED_SITES,
    }


def _rows(sites: Sequence[Record]) -> list[dict[str, object]]:
    return [
        {"site": site, "name": str(site.get("name")), "outcome": outcome_of(site)} for site in sites
    ]


def round_table(rounds: Sequence[Record]) -> dict[str, object]:
    """Return the rounds by their position from 1; of many, every ``step``-th and the last."""
    step = math.ceil(len(rounds) / MANY_ROUNDS)
    rows = [
        (at, entry) for at, entry in enumerate(rounds, 1) if at % step == 0 or at == len(rounds)
    ]
    return {"step": step, "rows": rows}


def drop_tables(rounds: Sequence[Record]) -> dict[str, object]:
    """Return the last replies that were not used, and counts by reason if there are more.

    ``reasons`` has (reason, replies) for the ``LISTED_REASONS`` most frequent reasons. ``others``
    is the number of replies with any other reason.
    """
    reasons: Counter[str] = Counter()
    last: deque[tuple[int, str, str]] = deque(maxlen=LAST_DROPS)
    for drop in each_drop(rounds):
        reasons[drop[2]] += 1
        last.append(drop)
    total = reasons.total()
    table = reasons.most_common(LISTED_REASONS) if total > LAST_DROPS else []
    others = total - sum(count for _, count in table) if table else 0
    return {"total": total, "last": list(last), "reasons": table, "others": others}


def total_traffic(summary: Record, rounds: Sequence[Record]) -> dict[str, float | None]:
    """Return the bytes of all recorded rounds, the trained share, and the model's size in bytes."""
    totals = {}
    for key in ("bytes_up", "bytes_down"):
        known = [number for number in read_column(rounds, key) if number is not None]
        totals[key] = sum(known) if known else None
    trained = read_number(summary.get("trained_parameters"))
    total = read_number(summary.get("total_parameters"))
    return {
        **totals,
        "share": trained / total if trained is not None and total else None,
        "whole_model": 4 * total if total else None,  # float32
    }
