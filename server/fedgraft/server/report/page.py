"""The report of a run: one HTML file that says first whether federating was worth it.

The file needs nothing from outside (no script, font or image), so that it can be mailed and still
be read in ten years. The same input gives the same bytes, so that two runs can be compared with
diff. All texts from data pass Jinja's autoescaping. A value that a run did not record is shown as
missing and never guessed, because every run must get a report, also a run that went wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from fedgraft.common.errors import RunError
from fedgraft.common.files import write_atomically
from fedgraft.common.metrics.metric import Metric
from fedgraft.common.metrics.verdict import COVERS
from fedgraft.server.report.figures import POOLED, curve_pictures, pooled_picture, site_picture
from fedgraft.server.report.insights import map_facts, movement_facts
from fedgraft.server.report.measures import measure_facts
from fedgraft.server.report.plots import MODELS
from fedgraft.server.report.site_overview import headline
from fedgraft.server.report.tables import drop_tables, round_table, site_tables, total_traffic
from fedgraft.server.report.values import (
    MISSING,
    Record,
    as_count,
    as_decimal,
    as_duration,
    as_metric,
    as_metric_interval,
    as_percent,
    as_points,
    as_share,
    as_size,
    natural_order,
    read_estimate,
    read_record,
    read_records,
    read_task,
)

__all__ = ["write_report"]


def write_report(folder: Path, summary: dict[str, Any], history: list[dict[str, Any]]) -> Path:
    """Write ``report.html`` into the run's folder, replacing an older one as a whole.

    Args:
        folder: the run's folder; it must exist.
        summary: the run's summary; shares are fractions, not percent; traffic is in bytes.
        history: one record per round, in order.

    Returns:
        The path of the report.

    Raises:
        RunError: the file cannot be written.
    """
    page = _render(summary, history)
    path = folder / "report.html"
    content = page.encode("utf-8", "replace")  # a lone surrogate in a label must not fail
    try:
        write_atomically(path, lambda partial: partial.write_bytes(content))
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}", hint="make room or fix its permissions"
        ) from error
    return path


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "count": as_count, "decimal": as_decimal, "duration": as_duration, "metric": as_metric,
        "metric_interval": as_metric_interval, "percent": as_percent, "points": as_points,
        "share": as_share, "size": as_size,
    }  # fmt: skip
    environment.filters.update(filters)
    environment.globals.update(record=read_record, records=read_records)
    return environment.get_template("page.html.j2")


def _render(summary: Record, history: Sequence[Record]) -> str:
    job, final = read_record(summary, "job"), read_record(summary, "final")
    labels = job.get("labels")
    sites = sorted(
        read_records(summary, "sites"), key=lambda site: natural_order(str(site.get("name")))
    )
    rounds = [entry for entry in history if isinstance(entry, Mapping)]
    task = read_task(summary)
    metrics, share = task.metrics, task.share  # the figures show the share
    return _template().render(
        summary=summary,
        job=job,
        labels=labels if isinstance(labels, list) else [],
        environment=sorted(read_record(summary, "environment").items()),
        models=MODELS,
        final={model: read_record(final, model) for model in POOLED},
        task=task,
        covers=COVERS,
        data_notes=_notes(summary),
        metrics=metrics,
        headline=_partners_headline(summary, metrics[0]) or headline(sites),
        pooled_sentence=_pooled_sentence(final, metrics[0]),
        pooled_picture=pooled_picture(final, share),
        rounds=rounds,
        round_table=round_table(rounds),
        curve_pictures=curve_pictures(rounds, share),
        drops=drop_tables(rounds),
        traffic=total_traffic(summary, rounds),
        site_picture=site_picture(sites, share),
        **site_tables(sites, metrics[0]),
        **measure_facts(final, sites),
        **movement_facts(summary),
        **map_facts(summary),
    )


def _notes(summary: Record) -> list[str]:
    """Return the sentences about the data of a simulation; a run of before has none."""
    notes = summary.get("data_notes")
    return [str(note) for note in notes] if isinstance(notes, list) else []


def _partners_headline(summary: Record, metric: Metric) -> str:
    """Return the headline for partner sites; empty for a simulation, which has more results."""
    partners = read_record(summary, "partners")
    if not partners:
        return ""
    value = read_estimate(read_record(partners, "validation"), metric.key).value
    figure = _figure(metric, value)
    said = f"Right for {figure} of" if metric.right else f"{metric.title} {figure} on"
    reached = "" if value is None else f"{said} what sites hold out. "
    return f"{reached}Whether it was worth it, each site knows for itself."


def _pooled_sentence(final: Record, metric: Metric) -> str:
    """Return a sentence that compares the federated model with two others on the pooled test set.

    The two are the models that readers ask for: the sites' own models, and a central model.
    """

    def of(model: str) -> float | None:
        return read_estimate(read_record(final, model), metric.key).value

    federated = of("federated")
    if federated is None:
        return ""
    said = "is right for" if metric.right else f"has {metric.name}"
    parts = [f"On the pooled test set the federated model {said} {_figure(metric, federated)}"]
    for model, who in (
        ("local_only", "the sites' own models, on average,"),
        ("central", "one model trained on all data in one place"),
    ):
        other = of(model)
        if other is not None:
            words = f"{who} for" if metric.right else who
            gap = _gap(metric, other, federated)
            parts.append(f"{words} {_figure(metric, other)} ({gap})")
    return "; ".join(parts) + "."


def _figure(metric: Metric, value: float | None) -> str:
    return metric.text(value, MISSING, "\u00a0%")


def _gap(metric: Metric, other: float, federated: float) -> str:
    """Return how much ``other`` is above or below ``federated``, in the digits of the metric."""
    size, none = (metric.text(one, unit=" points") for one in (abs(other - federated), 0.0))
    if size == none or _figure(metric, other) == _figure(metric, federated):
        return "the same"
    return f"{size} {'more' if other > federated else 'less'}"
