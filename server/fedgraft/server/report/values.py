"""Read a run's records, in which any part may be missing, and format numbers for people.

A value that is absent, null, of a wrong type or not finite becomes None or empty, and is shown as
missing.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedgraft.common.metrics.metric import Metric
from fedgraft.common.tasks import TASKS, Task
from fedgraft.server.report.plots import Estimate

__all__ = [
    "MISSING",
    "OUTCOMES",
    "Record",
    "as_count",
    "as_decimal",
    "as_duration",
    "as_metric",
    "as_metric_interval",
    "as_percent",
    "as_points",
    "as_share",
    "as_size",
    "each_drop",
    "natural_order",
    "outcome_of",
    "read_column",
    "read_estimate",
    "read_number",
    "read_record",
    "read_records",
    "read_task",
    "round_numbers",
]

Record = Mapping[str, Any]

MISSING = "–"  # noqa: RUF001 - an en dash, as tables are set
OUTCOMES = ("helped", "hurt", "unclear", "unknown")


def read_record(parent: Record, key: str) -> Record:
    """Return the object below ``key``, or an empty one."""
    found = parent.get(key)
    return found if isinstance(found, Mapping) else {}


def read_records(parent: Record, key: str) -> list[Record]:
    """Return the objects in the list below ``key``; other values are left out."""
    found = parent.get(key)
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def read_number(value: object) -> float | None:
    """Return ``value`` if it is a finite number, otherwise None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_column(records: Sequence[Record], key: str) -> list[float | None]:
    """Return the number below ``key`` in each record; None if it has none."""
    return [read_number(record.get(key)) for record in records]


def read_estimate(metrics: Record, key: str) -> Estimate:
    """Return the metric ``key`` with its interval."""
    ends = metrics.get(f"{key}_interval")
    pair = ends if isinstance(ends, list | tuple) and len(ends) == 2 else (None, None)
    low, high = read_number(pair[0]), read_number(pair[1])
    interval = None if low is None or high is None else (low, high)
    return Estimate(read_number(metrics.get(key)), interval)


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts site-2 before site-10."""
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+", name)
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts]


def read_task(summary: Record) -> Task:
    """Return the run's task; the first task of the table if the record has no known one."""
    name = read_record(summary, "job").get("task")
    return TASKS.get(str(name), next(iter(TASKS.values())))


def outcome_of(site: Record) -> str:
    """Return the site's outcome, one of ``OUTCOMES``."""
    found = site.get("outcome")
    return found if isinstance(found, str) and found in OUTCOMES else "unknown"


def round_numbers(rounds: Sequence[Record]) -> list[int]:
    """Return each round's number; its position from 1 if it has no number."""
    found = enumerate(read_column(rounds, "round"), 1)
    return [at if number is None else int(number) for at, number in found]


def each_drop(rounds: Sequence[Record]) -> Iterator[tuple[int, str, str]]:
    """Yield (round, site, reason) of every reply that was not used, in order."""
    for at, entry in zip(round_numbers(rounds), rounds, strict=True):
        for drop in read_records(entry, "dropped"):
            yield at, str(drop.get("site")), str(drop.get("reason") or "not recorded")


# --- formatting numbers


def as_share(value: object) -> str:
    """Return a fraction as percent."""
    number = read_number(value)
    return MISSING if number is None else f"{100 * number:.1f}\u00a0%"


def as_points(value: object) -> str:
    """Return a difference of fractions as signed percentage points; zero has no sign."""
    number = read_number(value)
    if number is None:
        return MISSING
    text = f"{100 * number:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def as_percent(metrics: Record, key: str) -> str:
    """Return the metric ``key`` as percent."""
    return as_share(read_estimate(metrics, key).value)


def as_metric(metrics: Record, metric: Metric) -> str:
    """Return a metric in the format of its kind."""
    return metric.text(read_estimate(metrics, metric.key).value, MISSING, "\u00a0%")


def as_metric_interval(metrics: Record, metric: Metric) -> str:
    """Return a metric's interval in the format of its kind."""
    found = read_estimate(metrics, metric.key).interval
    return MISSING if found is None else " to ".join(metric.text(end, unit="") for end in found)


def as_count(value: object) -> str:
    """Return a whole number with a separator between thousands."""
    number = read_number(value)
    return MISSING if number is None else f"{number:,.0f}"


def as_decimal(value: object) -> str:
    """Return a number with about three digits."""
    number = read_number(value)
    if number is None:
        return MISSING
    return f"{number:.3f}" if 0.01 <= abs(number) < 10_000 else f"{number:.3g}"


def as_size(value: object) -> str:
    """Return bytes in decimal units, as network operators use them."""
    number = read_number(value)
    if number is None:
        return MISSING
    units = ("kB", "MB", "GB", "TB", "PB")
    if abs(number) < 1000:
        return f"{number:.0f} B"
    power = min(int(math.log10(abs(number)) // 3), len(units))
    return f"{number / 1000**power:.1f} {units[power - 1]}"


def as_duration(value: object) -> str:
    """Return seconds in hours, minutes and seconds."""
    seconds = read_number(value)
    if seconds is None or seconds < 0:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
