"""The table of a sweep: for a terminal, as Markdown, and with the plot as one HTML file."""

import base64
from collections.abc import Callable
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from fedgraft.common.console import Console
from fedgraft.common.files import write_atomically, write_text
from fedgraft.common.metrics.metric import Metric
from fedgraft.simulations.baselines.over_seeds import Spread, spread
from fedgraft.simulations.sweep.grid import short_names
from fedgraft.simulations.sweep.results import Results, Row

__all__ = ["show", "table", "write_page", "write_table"]

NONE = "-"
# heading, metric, function that formats its mean and interval
Column = tuple[str, str, Callable[[Spread], str]]
COLUMNS: tuple[Column, ...] = (
    ("macro F1 %", "macro_f1", lambda found: found.text(scale=100)),
    ("loss", "loss", lambda found: found.text(digits=3)),
    ("rounds", "rounds", lambda found: f"{found.mean:.1f}".removesuffix(".0")),
    ("kB up", "bytes_up_per_site_round", lambda found: f"{found.mean / 1000:.0f}"),
    ("s", "seconds", lambda found: f"{found.mean:.0f}"),
    ("MB", "peak_memory_mb", lambda found: f"{found.mean:.0f}"),
)
ROOMY = {"macro_f1", "loss"}
_NAMES = {"validation": "federated validation", "test": "pooled test"}


def table(results: Results, *, narrow: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return headings and one line per combination; columns without any value are left out.

    ``narrow`` also leaves out the columns in ``ROOMY``, because a terminal has no room for them.
    """
    columns = [
        column
        for column in (*_judged(results.metric), *COLUMNS)
        if any(row.values(column[1]) for row in results.rows)
        and not (narrow and column[1] in ROOMY)
    ]
    names = short_names([axis.key for axis in results.swept])
    lines = []
    for at, row in enumerate(results.rows):
        means = [(row.spread(metric), write) for _, metric, write in columns]
        numbers = [NONE if found is None else write(found) for found, write in means]
        settings = list(row.settings.values()) or [row.label]
        lines.append([*settings, *numbers, "best" if at == results.best else _state(row)])
    return [*(names.values() or ["job"]), *(name for name, _, _ in columns), ""], lines


def _judged(metric: Metric) -> tuple[Column, ...]:
    """Return the columns of the metric that settings are compared by."""
    sign, name = (" %", "") if metric.percent else ("", f" {metric.short or metric.name}")
    return (
        (f"valid.{name}{sign}", "validation", lambda found: _written(found, metric)),
        (f"test{name}{sign}", "test", lambda found: _written(found, metric)),
    )


def _written(found: Spread, metric: Metric) -> str:
    """Return text such as ``88.7 ± 2.7``, as the metric is written, without a percent sign."""
    mean = metric.text(found.mean, unit="")
    return mean if found.half is None else f"{mean} ± {metric.text(found.half, unit='')}"


def _state(row: Row) -> str:
    states = [cell.status for cell in row.cells]
    counts = {state: states.count(state) for state in ("failed", "not finished")}
    return ", ".join(f"{n} of {len(states)} {state}" for state, n in counts.items() if n)


def headline(results: Results) -> str:
    """Return a sentence: the best setting, and its difference to the next on the same seeds."""
    if results.apart:
        metric = results.metric
        return (
            f"No best setting: {metric.name} is a mean over {metric.parts}, and each backbone has "
            f"{metric.parts} of its own, so rows of different backbones do not compare."
        )
    if results.best is None or results.chosen_by is None:
        return "No best setting: there is nothing to choose between."
    metric, best = results.metric, results.rows[results.best]
    mean = _written(spread(best.values(results.chosen_by)), metric)
    sign, points = (" %", " points") if metric.percent else ("", "")
    text = f"Best by {_NAMES[results.chosen_by]} {metric.name}: {best.label}, {mean}{sign}"
    gaps = [(_gap(best, row, results), row) for row in results.rows
            if row.complete and row is not best]  # fmt: skip
    if not gaps:
        return f"{text}."
    gap, row = min(gaps, key=lambda found: found[0].mean)
    text += f"; the next, {row.label}, is {_written(gap, metric)}{points} behind"
    unsure = gap.half is not None and gap.half >= gap.mean
    return text + (f", which {len(results.seeds)} seeds cannot tell from 0." if unsure else ".")


def _gap(best: Row, row: Row, results: Results) -> Spread:
    """Return by how much the best row is better than another, paired by seed.

    A seed gives both rows the same split, so the chance in the split cancels out.
    """
    assert results.chosen_by is not None  # noqa: S101  # there is a best row
    pairs = zip(best.values(results.chosen_by), row.values(results.chosen_by), strict=True)
    sign = 1 if results.metric.higher else -1
    return spread([sign * (ours - theirs) for ours, theirs in pairs])


def footnotes(results: Results) -> list[str]:
    """Return the notes that a reader needs to understand the table."""
    count, seeds = len(results.rows), len(results.seeds)
    notes = [
        f"± is half a 95 % t-interval over {seeds} seeds, which draw split, head, factors and "
        "batches anew."
        if seeds > 1
        else "One seed: no interval, and a difference may be chance. --seeds 3 tells more."
    ]
    if results.chosen_by == "validation":
        notes.append(
            "Choose by the validation column: federated validation, on examples that the sites "
            "held out of training. The best of many cells by the test column would look better "
            "than it is on new data."
        )
    elif results.best is not None:
        notes.append(
            f"There is no federated validation, so the best was picked on the test set: the best "
            f"of {count} there is optimistic. data.validation = 0.1 gives examples to choose by."
        )
    notes.append(
        "Test columns are of the federated model on the pooled test set. kB up: what a site sent a "
        "round; s and MB: a cell's time and the peak of the whole sweep's processes meanwhile."
    )
    return notes


def failures(results: Results) -> list[str]:
    """Return each failed cell with its error."""
    return [f"{cell.label}: {cell.error}" for cell in results.failed]


def show(console: Console, results: Results) -> None:
    """Print the table on the console, and the paths of the results."""
    console.table(f"Sweep of {results.job}", *table(results, narrow=True))
    for line in (headline(results), *footnotes(results)):
        console.text(line)
    for line in failures(results):
        console.text(f"failed: {line}")
    console.text("")
    console.text(f"sweep: {results.folder}  more: table.md, sweep.html and results.json in it")
    if results.best is not None:
        run = results.rows[results.best].cells[0].run
        console.text(f"next: fedgraft export {results.folder}/runs/{run}")


def write_table(results: Results) -> None:
    """Write ``table.md`` into the sweep's folder."""
    columns, lines = table(results)
    keys = max(1, len(results.swept))
    marks = [*["---"] * keys, *["--:"] * (len(columns) - keys - 1), "---"]
    grid = [_markdown(line) for line in (columns, marks, *lines)]
    failed = [f"- failed: {_inline(line)}" for line in failures(results)]
    parts = [f"# Sweep of {results.job}", headline(results), "\n".join(grid), "\n".join(failed)]
    parts += footnotes(results)
    write_text(results.folder / "table.md", "\n\n".join(part for part in parts if part) + "\n")


def _markdown(cells: list[str]) -> str:
    return f"| {' | '.join(_inline(cell) for cell in cells)} |"


def _inline(text: str) -> str:
    """Return text that fits in a table: a value may hold a bar, an error several lines."""
    return " ".join(text.split()).replace("|", "\\|")


def write_page(results: Results) -> None:
    """Write ``sweep.png``, if there are values to draw, and ``sweep.html``, which contains it."""
    from fedgraft.simulations.sweep.plots import draw  # imports matplotlib only when needed

    drawn = any(row.values("test") or row.values("validation")
                for row in results.rows)  # fmt: skip
    picture = draw(results) if drawn else None
    if picture is not None:
        png = picture
        write_atomically(results.folder / "sweep.png", lambda path: path.write_bytes(png))
    columns, lines = table(results)
    page = _template().render(
        results=results,
        headline=headline(results),
        columns=columns,
        judged=[name for name, _, _ in _judged(results.metric)],
        lines=lines,
        footnotes=footnotes(results),
        failures=failures(results),
        picture=base64.b64encode(picture).decode() if picture else "",
    )
    content = page.encode("utf-8", "replace")
    write_atomically(results.folder / "sweep.html", lambda path: path.write_bytes(content))


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
    return environment.get_template("page.html.j2")
