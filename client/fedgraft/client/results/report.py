"""A site's own report of a run: ``report.json`` for machines, ``report.md`` and ``report.html``.

The page is complete in itself (no script, font or image from outside), and the same report gives
the same bytes. Text from the coordinator is autoescaped like all other text.
"""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from fedgraft.common.files import write_text
from fedgraft.common.metrics.metric import Metric
from fedgraft.common.metrics.verdict import COVERS, as_points
from fedgraft.common.tasks import TASKS

__all__ = ["read_report", "write_report"]

NAMES = {
    "federated": "Federated",
    "local_only": "On its own data alone",
    "zero_shot": "Backbone untouched",
}
MISSING = "not measured"
WIDTH, HEIGHT = 600, 120  # of the curve, in units of its SVG


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write ``report`` (of ``compare.compare``) into ``folder`` in all three forms."""
    task = TASKS[report["task"]]
    rounds = [line | _known(line, task.share.key) for line in report["rounds"]]
    report = report | {"rounds": rounds}
    facts = {
        "report": report,
        "names": NAMES,
        "points": _curve(rounds, task.share.key),
        "task": task,
        "covers": COVERS,
        "metrics": task.metrics,
        "share": task.share,  # the metric of the bars and of the curve
    }
    for name in ("report.md", "report.html"):
        text = _templates().get_template(f"{name}.j2").render(facts)
        write_text(folder / name, text.encode("utf-8", "replace").decode())
    write_text(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")


def read_report(folder: Path) -> dict[str, Any] | None:
    """Return the report in ``folder``; None if it is not made yet."""
    path = folder / "report.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "percent": _percent,
        "metric": _metric,
        "interval": _interval,
        "points": as_points,
        "place": _place,
    }
    environment.filters.update(filters)
    return environment


def _known(line: dict[str, Any], share: str) -> dict[str, float | None]:
    """Return the numbers of a round; None for a missing number, because JSON has no NaN."""
    return {
        key: float(line[key]) if line[key] is not None and math.isfinite(line[key]) else None
        for key in (share, "loss")
    }


def _curve(rounds: list[dict[str, Any]], share: str) -> str:
    """Return a share over rounds as points of an SVG polyline: 0 % is bottom, 100 % is top.

    The text is empty if there is nothing to see: one round, or never a share above 0 %.
    """
    known = [(line["round"], line[share]) for line in rounds if line[share] is not None]
    if len(known) < 2 or all(value <= 0 for _, value in known):
        return ""
    first, span = known[0][0], max(known[-1][0] - known[0][0], 1)
    return " ".join(
        f"{WIDTH * (number - first) / span:.1f},{HEIGHT * (1 - min(max(value, 0.0), 1.0)):.1f}"
        for number, value in known
    )


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f} %"


def _place(share: float) -> str:
    """Return where ``share`` lies in a bar from 0 to 100; R2 may be below 0, a bar starts there."""
    return f"{100 * min(max(share, 0.0), 1.0):.2f}"


def _metric(model: dict[str, Any], metric: Metric) -> str:
    return metric.text(model[metric.key])


def _interval(model: dict[str, Any], metric: Metric) -> str:
    """Return the interval as text; empty if there is none, such as of R2 for few examples."""
    ends = model.get(f"{metric.key}_interval")
    if ends is None:
        return ""
    return f"{metric.text(ends[0], unit='')} to {metric.text(ends[1])}"
