"""The figure of a sweep: the headline metric over one or two swept keys, or a row per combination.

A key with numbers becomes a line with the interval over seeds; a key with names becomes dots. A
second key gives several lines or series of dots. All other sweeps have one row per combination.
Small dots are single seeds. Federated validation, by which settings are chosen, is beside the test
set.
"""

import io
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedgraft.server.report.plots import within_percent
from fedgraft.simulations.baselines.over_seeds import spread
from fedgraft.simulations.sweep.grid import Axis, as_number, short_names
from fedgraft.simulations.sweep.results import Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

__all__ = ["draw"]

PANELS = {
    "validation": "Federated validation",
    "test": "Pooled test set",
}
# The hues of Okabe and Ito can be distinguished with any common colour blindness; markers differ,
# too.
LOOKS = (("#0067a8", "o"), ("#c04a00", "s"), ("#00795a", "D"), ("#a3437c", "^"), ("#8a6100", "v"),
         ("#3c4653", "X"))  # fmt: skip
INK, MUTED, LINE = "#1a222c", "#55606e", "#d8dde3"
LOG_RATIO = 4  # the axis is logarithmic if largest / smallest value is above this
NAME_LENGTH = 44
CROWDED = 48  # characters on an x axis; with more, the texts are rotated


def draw(results: Results) -> bytes:
    """Return the figure as PNG."""
    panels = [metric for metric in PANELS if any(row.values(metric) for row in results.rows)]
    keys = results.swept
    if len(keys) == 1 or (len(keys) == 2 and len(keys[1].values) <= len(LOOKS)):
        size = (4.4 * len(panels), 3.4)
        return _render(lambda figure: _over_key(figure, results, panels), size)
    longest = max(len(_short(row.label)) for row in results.rows)
    size = (3.3 * len(panels) + 0.08 * longest, 1.1 + 0.3 * len(results.rows))
    return _render(lambda figure: _rows(figure, results, panels), size)


def _over_key(figure: "Figure", results: Results, panels: Sequence[str]) -> None:
    """Draw the first key on the x axis, and a series for each value of the second key."""
    first, second = results.swept[0], results.swept[1] if results.swept[1:] else None
    names = short_names([axis.key for axis in results.swept])
    spots = _spots(first)
    series = second.values if second else ("",)
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, metric in zip(every, panels, strict=True):
        for at, value in enumerate(series):
            rows = [r for r in results.rows if not second or r.settings[second.key] == value]
            points = sorted(
                ((spots[row.settings[first.key]], row) for row in rows), key=lambda point: point[0]
            )
            label = f"{names[second.key]}={_short(value)}" if second else ""
            aside = 7 * (at - (len(series) - 1) / 2)  # otherwise intervals would hide each other
            drawn = [(x, _scaled(row, metric, results)) for x, row in points]
            _series(axes, drawn, look=LOOKS[at], aside=aside, label=label)
            if _numeric(first):
                _join(axes, drawn, colour=LOOKS[at][0], aside=aside)
        _scale(axes, first, spots)
        _frame(axes, PANELS[metric], x=names[first.key], y=_named(results))
        axes.grid(axis="y", color=LINE, linewidth=0.8)
    if results.metric.percent:
        within_percent(every[0], "y", _lowest(results, panels))
    if second:
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper left", frameon=False, labelcolor=INK,
            ncols=min(3, len(labels)),
        )  # fmt: skip


def _numeric(axis: Axis) -> bool:
    return all(as_number(value) is not None for value in axis.values)


def _spots(axis: Axis) -> dict[str, float]:
    """Return each value's place on the x axis: the values if all are numbers, else 0, 1, 2..."""
    numbers = [as_number(value) for value in axis.values]
    known = [number for number in numbers if number is not None]
    places = known if len(known) == len(numbers) else [float(at) for at in range(len(numbers))]
    return dict(zip(axis.values, places, strict=True))


def _named(results: Results) -> str:
    """Return the metric's name with its unit, for an axis."""
    metric = results.metric
    return f"{metric.name}, %" if metric.percent else metric.name


def _scaled(row: Row, metric: str, results: Results) -> list[float]:
    """Return the values of a row's seeds as they are drawn: shares in percent."""
    return [(100 if results.metric.percent else 1) * value for value in row.values(metric)]


def _series(
    axes: "Axes",
    points: Sequence[tuple[float, Sequence[float]]],
    *,
    look: tuple[str, str],
    aside: float,
    label: str,
) -> None:
    """Draw means with their intervals and single seeds, all moved by ``aside`` points.

    ``points`` are places on the x axis with the values of the seeds.
    """
    colour, marker = look
    beside = _moved(axes, aside)
    for x, values in points:
        if not values:
            continue
        found = spread(values)
        half = found.half or 0.0
        ends = [found.mean - half, found.mean + half]
        axes.update_datalim([(x, end) for end in ends])  # moved lines do not do this themselves
        if half:
            axes.plot([x, x], ends, color=colour, linewidth=1.4, alpha=0.7, transform=beside)
            axes.plot([x] * len(values), values, marker, color=colour, alpha=0.5, markersize=3.5,
                      markeredgewidth=0, transform=beside)  # fmt: skip
        axes.plot([x], [found.mean], marker, color=colour, markersize=7, zorder=4,
                  markeredgecolor="white", transform=beside, label=label)  # fmt: skip
        label = ""  # one entry in the legend


def _join(
    axes: "Axes", points: Sequence[tuple[float, Sequence[float]]], *, colour: str, aside: float
) -> None:
    means = [(x, statistics.fmean(values)) for x, values in points if values]
    xs, ys = [x for x, _ in means], [y for _, y in means]
    axes.plot(xs, ys, color=colour, linewidth=1.6, transform=_moved(axes, aside))


def _moved(axes: "Axes", points: float) -> "Transform":
    from matplotlib.transforms import ScaledTranslation

    moved: Transform = axes.transData + ScaledTranslation(
        points / 72, 0, axes.figure.dpi_scale_trans
    )
    return moved


def _scale(axes: "Axes", axis: Axis, spots: Mapping[str, float]) -> None:
    """Set the ticks to the values as they were written, without ticks between them."""
    places = list(spots.values())
    if not _numeric(axis):
        axes.set_xlim(-0.5, len(places) - 0.5)
    elif min(places) > 0 and max(places) / min(places) > LOG_RATIO:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.margins(x=0.12)
    axes.autoscale_view()
    crowded = sum(len(_short(value)) + 2 for value in axis.values) > CROWDED
    axes.set_xticks(places, [_short(value) for value in axis.values],
                    rotation=30 if crowded else 0, ha="right" if crowded else "center")  # fmt: skip


def _rows(figure: "Figure", results: Results, panels: Sequence[str]) -> None:
    """Draw one row per combination, from top to bottom."""
    colour, marker = LOOKS[0]
    every = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
    for axes, metric in zip(every, panels, strict=True):
        for at, row in enumerate(results.rows):
            if not (values := _scaled(row, metric, results)):
                continue
            found = spread(values)
            if found.half is not None:
                ends = [found.mean - found.half, found.mean + found.half]
                axes.plot(ends, [at, at], color=colour, linewidth=1.4, alpha=0.7)
                axes.plot(values, [at] * len(values), marker, color=colour, alpha=0.5,
                          markersize=3.5, markeredgewidth=0)  # fmt: skip
            axes.plot([found.mean], [at], marker, color=colour, markersize=7, zorder=4,
                      markeredgecolor="white")  # fmt: skip
        labels = [_short(row.label) if axes is every[0] else "" for row in results.rows]
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        _frame(axes, PANELS[metric], x=_named(results), y="")
        axes.grid(axis="x", color=LINE, linewidth=0.8)
    if results.metric.percent:
        within_percent(every[0], "x", _lowest(results, panels))


def _frame(axes: "Axes", title: str, *, x: str, y: str) -> None:
    axes.set_title(title, color=INK, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)


def _lowest(results: Results, panels: Sequence[str]) -> float:
    """Return the least value of a seed, in percent; an interval of two seeds may be far wider."""
    values = [value for row in results.rows for metric in panels for value in row.values(metric)]
    return 100 * min(values)


def _short(text: str) -> str:
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return text if len(text) <= NAME_LENGTH else text[: NAME_LENGTH - 1] + "…"


def _render(paint: Callable[["Figure"], None], size: tuple[float, float]) -> bytes:
    """Draw on a figure of ``size``, width and height in inches; return it as PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the figure
        # a value called "$a$" is a name, not a formula
        matplotlib.rcParams.update({"font.size": 10, "text.parse_math": False})
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()
