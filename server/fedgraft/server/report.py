"""What people look at after a run: one HTML file that says first whether federating was worth it.

The file stands alone (no script, font or image from outside) so that it can be mailed and still be
read in ten years; the same input gives the same bytes, so that two runs can be compared with diff.
Everything that comes from data passes Jinja's autoescaping. A value that a run did not record is
shown as missing, never guessed: a report must come out of every run, also of one that went wrong.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from fedgraft.common.errors import RunError
from fedgraft.common.files import write_atomically
from fedgraft.server import report_plots
from fedgraft.server.report_plots import MODELS, Curve, Estimate, Picture

__all__ = ["write_report"]

Record = Mapping[str, Any]

MISSING = "–"  # noqa: RUF001 - an en dash, as tables are set
DOT_PLOT_SITES = 40  # above, one row per site is longer than anyone reads
LISTED_SITES = 8
POOLED = ("federated", "central", "head_only", "zero_shot", "local_only")
SITE_MODELS = ("federated", "federated_tuned", "local_only", "zero_shot", "head_only", "central")
PLOTTED = ("federated", "federated_tuned", "local_only")
OUTCOMES = ("helped", "hurt", "unclear", "unknown")


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
        "count": _count, "decimal": _decimal, "duration": _duration, "interval": _interval,
        "percent": _percent, "share": _share, "size": _size,
    }  # fmt: skip
    environment.filters.update(filters)
    environment.globals.update(record=_record, records=_records)
    return environment.get_template("report.html.j2")


def _render(summary: Record, history: Sequence[Record]) -> str:
    job, final = _record(summary, "job"), _record(summary, "final")
    labels = job.get("labels")
    sites = sorted(_records(summary, "sites"), key=lambda site: _natural(str(site.get("name"))))
    rounds = [entry for entry in history if isinstance(entry, Mapping)]
    return _template().render(
        summary=summary,
        job=job,
        labels=labels if isinstance(labels, list) else [],
        environment=sorted(_record(summary, "environment").items()),
        models=MODELS,
        final={model: _record(final, model) for model in POOLED},
        headline=_headline(sites),
        pooled_sentence=_pooled_sentence(final),
        pooled_picture=_pooled_picture(final),
        rounds=rounds,
        curve_pictures=_curve_pictures(rounds),
        drops=_drops(rounds),
        traffic=_traffic(summary, rounds),
        **_site_context(sites),
    )


# --- reading: whatever is absent, null, of a wrong type or not finite is None or empty


def _record(parent: Record, key: str) -> Record:
    found = parent.get(key)
    return found if isinstance(found, Mapping) else {}


def _records(parent: Record, key: str) -> list[Record]:
    found = parent.get(key)
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _column(records: Sequence[Record], key: str) -> list[float | None]:
    return [_finite(record.get(key)) for record in records]


def _estimate(metrics: Record, key: str = "accuracy") -> Estimate:
    ends = metrics.get(f"{key}_interval")
    pair = ends if isinstance(ends, list | tuple) and len(ends) == 2 else (None, None)
    low, high = _finite(pair[0]), _finite(pair[1])
    interval = None if low is None or high is None else (low, high)
    return Estimate(_finite(metrics.get(key)), interval)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which site-2 comes before site-10."""
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+", name)
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts]


# --- writing numbers


def _share(value: object) -> str:
    number = _finite(value)
    return MISSING if number is None else f"{100 * number:.1f}\u00a0%"


def _percent(metrics: Record, key: str = "accuracy") -> str:
    return _share(_estimate(metrics, key).value)


def _interval(metrics: Record, key: str = "accuracy") -> str:
    found = _estimate(metrics, key).interval
    return MISSING if found is None else f"{100 * found[0]:.1f} to {100 * found[1]:.1f}"


def _count(value: object) -> str:
    number = _finite(value)
    return MISSING if number is None else f"{number:,.0f}"


def _decimal(value: object) -> str:
    number = _finite(value)
    if number is None:
        return MISSING
    return f"{number:.3f}" if 0.01 <= abs(number) < 10_000 else f"{number:.3g}"


def _size(value: object) -> str:
    """Bytes in the decimal units of network operators."""
    number = _finite(value)
    if number is None:
        return MISSING
    units = ("kB", "MB", "GB", "TB", "PB")
    if abs(number) < 1000:
        return f"{number:.0f} B"
    power = min(int(math.log10(abs(number)) // 3), len(units))
    return f"{number / 1000**power:.1f} {units[power - 1]}"


def _duration(value: object) -> str:
    seconds = _finite(value)
    if seconds is None or seconds < 0:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


# --- the headline


def _headline(sites: Sequence[Record]) -> str:
    """Was it worth it, in one sentence counted from the sites' verdicts."""
    tally = Counter(_outcome(site) for site in sites)
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
            _outcome(sites[0]),
            "The test examples of the one site cannot tell if federating helped.",
        )
    if not helped and not hurt:
        return (
            f"The test examples of {compared} sites cannot tell if federating helped any of them."
        )
    parts = [f"Federating helped {helped} of {len(sites)} sites and hurt {hurt or 'none'}"]
    if unclear:
        parts.append(f"for {unclear} the test examples cannot tell")
    if tally["unknown"]:
        parts.append(f"{tally['unknown']} could not be compared")
    return "; ".join(parts) + "."


def _outcome(site: Record) -> str:
    found = site.get("outcome")
    return found if isinstance(found, str) and found in OUTCOMES else "unknown"


def _pooled_sentence(final: Record) -> str:
    """Federated beside the two references a reader has in mind, on the pooled test set."""
    federated = _estimate(_record(final, "federated")).value
    if federated is None:
        return ""
    parts = [f"On the pooled test set the federated model is right for {_share(federated)}"]
    for model, words in (
        ("local_only", "the sites' own models, on average, for"),
        ("central", "one model trained on all data in one place for"),
    ):
        other = _estimate(_record(final, model)).value
        if other is not None:
            parts.append(f"{words} {_share(other)} ({_gap(other - federated)})")
    return "; ".join(parts) + "."


def _gap(difference: float) -> str:
    points = f"{100 * abs(difference):.1f} points"
    return f"{points} {'more' if difference > 0 else 'less'}" if points[:3] != "0.0" else "the same"


# --- the figures


def _pooled_picture(final: Record) -> Picture | None:
    rows = [(model, _estimate(_record(final, model))) for model in POOLED]
    rows = [(model, found) for model, found in rows if found.value is not None]
    if not rows:
        return None
    said = "; ".join(f"{MODELS[model].name} {_share(found.value)}" for model, found in rows)
    return Picture(
        report_plots.single_dots(rows, label="Pooled test accuracy", key="pooled"),
        f"Dot plot of accuracy on the pooled test set with 95 % intervals: {said}.",
        "Accuracy on the pooled test set. Bars are 95 % intervals.",
    )


def _curve_pictures(rounds: Sequence[Record]) -> list[Picture]:
    """Validation quality and losses over rounds; one that nothing was measured for is left out."""
    checks = [_record(entry, "validation") for entry in rounds]
    accuracy = Curve("accuracy", _column(checks, "accuracy"))
    macro_f1 = Curve("macro F1", _column(checks, "macro_f1"), second=True)
    validation = Curve("validation loss", _column(checks, "loss"))
    train = Curve("train loss", _column(rounds, "train_loss"), second=True)
    pictures = (
        _curve_picture(rounds, [accuracy, macro_f1], "Federated validation", percent=True),
        _curve_picture(rounds, [validation, train], "Loss", percent=False),
    )
    return [picture for picture in pictures if picture is not None]


def _curve_picture(
    rounds: Sequence[Record], lines: Sequence[Curve], label: str, *, percent: bool
) -> Picture | None:
    lines = [line for line in lines if any(value is not None for value in line.values)]
    if not lines:
        return None
    dropped = sorted({at for at, _, _ in _drops(rounds)})
    numbers = _round_numbers(rounds)
    key = label.split()[-1].lower()
    svg = report_plots.curves(
        numbers, lines, dropped=dropped, label=label, percent=percent, key=key
    )
    said = "; ".join(_course(line, percent) for line in lines)
    mark = " A cross marks a round in which sites were dropped." if dropped else ""
    return Picture(svg, f"{label} over {len(rounds)} rounds: {said}.", f"{label} per round.{mark}")


def _round_numbers(rounds: Sequence[Record]) -> list[int]:
    found = enumerate(_column(rounds, "round"), 1)
    return [at if number is None else int(number) for at, number in found]


def _course(line: Curve, percent: bool) -> str:
    known = [value for value in line.values if value is not None]
    write = _share if percent else _decimal
    return f"{line.name} from {write(known[0])} at first to {write(known[-1])} at last"


def _site_picture(sites: Sequence[Record]) -> Picture | None:
    """A dot plot with intervals, or for many sites one dot per site."""
    estimates = [{model: _estimate(_record(site, model)) for model in PLOTTED} for site in sites]
    if len(sites) > DOT_PLOT_SITES:
        return _site_scatter(estimates)
    models = [model for model in PLOTTED if any(row[model].value is not None for row in estimates)]
    if not models:
        return None
    rows = [(str(site.get("name")), row) for site, row in zip(sites, estimates, strict=True)]
    names = ", ".join(MODELS[model].name.lower() for model in models)
    return Picture(
        report_plots.dots(rows, models, label="Accuracy on the site's own test set", key="sites"),
        f"Dot plot of own-test accuracy with 95 % intervals for {len(sites)} sites ({names}); "
        "the numbers are in the table of sites.",
        "Accuracy on each site's own test set. Bars are 95 % intervals.",
    )


def _site_scatter(estimates: Sequence[Mapping[str, Estimate]]) -> Picture | None:
    found = [(row["local_only"].value, row["federated"].value) for row in estimates]
    pairs = [(local, ours) for local, ours in found if local is not None and ours is not None]
    if not pairs:
        return None
    above = sum(ours > local for local, ours in pairs)
    below = sum(ours < local for local, ours in pairs)
    return Picture(
        report_plots.scatter(pairs, key="sites"),
        f"Scatter plot of own-test accuracy, federated against local only, for {len(pairs)} sites: "
        f"{above} above the line of equality, {below} below.",
        f"One dot per site ({len(pairs)} of {len(estimates)} have both values): above the dashed "
        f"line federated is better, below it local only. Over {DOT_PLOT_SITES} sites no interval "
        "is drawn; the table has them.",
    )


# --- the tables


def _site_context(sites: Sequence[Record]) -> dict[str, object]:
    """The rows and columns of the site table, its means, and who was helped or hurt."""
    rows = [
        {"site": site, "name": str(site.get("name")), "outcome": _outcome(site)} for site in sites
    ]
    means = {}
    for model in SITE_MODELS:
        found = [_estimate(_record(site, model)).value for site in sites]
        if known := [value for value in found if value is not None]:
            means[model] = fmean(known)
    return {
        "sites": rows,
        "site_absent": [MODELS[model].name for model in SITE_MODELS if model not in means],
        "site_means": means,
        "site_shifts": any(site.get("shift") for site in sites),
        "site_picture": _site_picture(sites),
        "groups": {one: [row for row in rows if row["outcome"] == one] for one in OUTCOMES},
        "listed": LISTED_SITES,
    }


def _drops(rounds: Sequence[Record]) -> list[tuple[int, str, str]]:
    """(round, site, reason) of every reply that was not used."""
    return [
        (at, str(drop.get("site")), str(drop.get("reason") or "not recorded"))
        for at, entry in zip(_round_numbers(rounds), rounds, strict=True)
        for drop in _records(entry, "dropped")
    ]


def _traffic(summary: Record, rounds: Sequence[Record]) -> dict[str, float | None]:
    """Totals over the rounds on record, and what training adds to or changes in the model."""
    totals = {}
    for key in ("bytes_up", "bytes_down"):
        known = [number for number in _column(rounds, key) if number is not None]
        totals[key] = sum(known) if known else None
    trained = _finite(summary.get("trained_parameters"))
    total = _finite(summary.get("total_parameters"))
    return {
        **totals,
        "share": trained / total if trained is not None and total else None,
        "whole_model": 4 * total if total else None,  # float32
    }
