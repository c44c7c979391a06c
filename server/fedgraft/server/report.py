"""What people look at after a run: one HTML file that says first whether federating was worth it.

The file stands alone (no script, font or image from outside) so that it can be mailed and still be
read in ten years; the same input gives the same bytes, so that two runs can be compared with diff.
Everything that comes from data passes Jinja's autoescaping. A value that a run did not record is
shown as missing, never guessed: a report must come out of every run, also of one that went wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from fedgraft.common.errors import RunError
from fedgraft.common.files import write_atomically
from fedgraft.server.report_figures import POOLED, curve_pictures, pooled_picture, site_picture
from fedgraft.server.report_insights import map_facts, movement_facts
from fedgraft.server.report_measures import measure_facts
from fedgraft.server.report_plots import MODELS
from fedgraft.server.report_tables import drop_tables, round_table, site_tables, total_traffic
from fedgraft.server.report_values import (
    Record,
    as_count,
    as_decimal,
    as_duration,
    as_interval,
    as_percent,
    as_points,
    as_share,
    as_size,
    natural_order,
    read_estimate,
    read_record,
    read_records,
)
from fedgraft.server.site_overview import headline

__all__ = ["write_report"]


def write_report(folder: Path, summary: dict[str, Any], history: list[dict[str, Any]]) -> Path:
    """Write ``report.html`` into the run's folder, replacing an older one as a whole.

    Args:
        folder: the run's folder; it must exist.
        summary: the run's summary; metrics are fractions 0..1, traffic is in bytes.
        history: one record per round, in order.

    Returns:
        The path of the report.

    Raises:
        RunError: the file cannot be written.
    """
    page = _render(summary, history)
    path = folder / "report.html"
    content = page.encode("utf-8", "replace")  # a lone surrogate in a label must not lose it all
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
        "count": as_count, "decimal": as_decimal, "duration": as_duration, "interval": as_interval,
        "percent": as_percent, "points": as_points, "share": as_share, "size": as_size,
    }  # fmt: skip
    environment.filters.update(filters)
    environment.globals.update(record=read_record, records=read_records)
    return environment.get_template("report.html.j2")


def _render(summary: Record, history: Sequence[Record]) -> str:
    job, final = read_record(summary, "job"), read_record(summary, "final")
    labels = job.get("labels")
    sites = sorted(
        read_records(summary, "sites"), key=lambda site: natural_order(str(site.get("name")))
    )
    rounds = [entry for entry in history if isinstance(entry, Mapping)]
    return _template().render(
        summary=summary,
        job=job,
        labels=labels if isinstance(labels, list) else [],
        environment=sorted(read_record(summary, "environment").items()),
        models=MODELS,
        final={model: read_record(final, model) for model in POOLED},
        headline=_partners_headline(summary) or headline(sites),
        pooled_sentence=_pooled_sentence(final),
        pooled_picture=pooled_picture(final),
        rounds=rounds,
        round_table=round_table(rounds),
        curve_pictures=curve_pictures(rounds),
        drops=drop_tables(rounds),
        traffic=total_traffic(summary, rounds),
        site_picture=site_picture(sites),
        **site_tables(sites),
        **measure_facts(final, sites),
        **movement_facts(summary),
        **map_facts(summary),
    )


def _partners_headline(summary: Record) -> str:
    """What the coordinator of partner sites can say; empty for a simulation, which knows more."""
    partners = read_record(summary, "partners")
    if not partners:
        return ""
    accuracy = read_estimate(read_record(partners, "validation")).value
    reached = "" if accuracy is None else f"Right for {as_share(accuracy)} of what sites hold out. "
    return f"{reached}Whether it was worth it, each site knows for itself."


def _pooled_sentence(final: Record) -> str:
    """Federated beside the two references a reader has in mind, on the pooled test set."""
    federated = read_estimate(read_record(final, "federated")).value
    if federated is None:
        return ""
    parts = [f"On the pooled test set the federated model is right for {as_share(federated)}"]
    for model, words in (
        ("local_only", "the sites' own models, on average, for"),
        ("central", "one model trained on all data in one place for"),
    ):
        other = read_estimate(read_record(final, model)).value
        if other is not None:
            parts.append(f"{words} {as_share(other)} ({_gap(other - federated)})")
    return "; ".join(parts) + "."


def _gap(difference: float) -> str:
    points = f"{100 * abs(difference):.1f} points"
    return f"{points} {'more' if difference > 0 else 'less'}" if points[:3] != "0.0" else "the same"
