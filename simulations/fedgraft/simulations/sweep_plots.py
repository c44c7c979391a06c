"""The figure of a sweep: accuracy over one or two swept keys, or a dot a combination.

One key that is a number becomes a line with the interval over seeds, one that is a name becomes
dots; a second key makes several of them. Anything else has one row a combination. Small dots are
single seeds. Beside the test set stands federated validation, which is what to choose by.
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedgraft.simulations.sweep_grid import Axis, as_number, short_names
from fedgraft.simulations.sweep_results import Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

PANELS = {
    "validation_accuracy": "Federated validation accuracy, %",
    "test_accuracy": "Pooled test accuracy, %",
}
# Okabe and Ito's hues, told apart with any common colour blindness; markers repeat what they say.
LOOKS = (("#0067a8", "o"), ("#c04a00", "s"), ("#00795a", "D"), ("#a3437c", "^"), ("#8a6100", "v"),
         ("#3c4653", "X"))  # fmt: skip
INK, MUTED, LINE = "#1a222c", "#55606e", "#d8dde3"
LOG_RATIO = 4  # values further apart than this stand on a logarithmic axis
NAME_LENGTH = 44


def draw(results: Results) -> bytes:
    """The figure as PNG."""
    panels = [m for m in PANELS if any(row.values(m) for row in results.rows)]
    swept = results.swept
    by_key = 1 <= len(swept) <= 2 and len(swept[-1].values) <= (len(LOOKS) if swept[1:] else 99)
    if by_key:
        return _render(lambda figure: _over_key(figure, results, panels), len(panels), 3.4)
    height = 1.1 + 0.34 * len(results.rows)
    return _render(lambda figure: _rows(figure, results, panels), len(panels), height)


def _over_key(figure: "Figure", results: Results, panels: Sequence[str]) -> None:
    """The first key on the x axis, one line (or row of dots) for each value of the second."""
    first, second = results.swept[0], results.swept[1] if results.swept[1:] else None
    names = short_names([axis.key for axis in results.swept])
    numbers = [as_number(value) for value in first.values]
    spots = {value: float(at) for at, value in enumerate(first.values)}
    numeric = all(number is not None for number in numbers)
    if numeric:
        spots = {value: number for value, number in zip(first.values, numbers, strict=True)
                 if number is not None}  # fmt: skip
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, metric in zip(every, panels, strict=True):
        for at, value in enumerate(second.values if second else ("",)):
            rows = [r for r in results.rows if not second or r.settings[second.key] == value]
            shift = 0.0 if numeric or not second else 0.16 * (at - (len(second.values) - 1) / 2)
            points = [(spots[row.settings[first.key]] + shift, row) for row in rows]
            label = f"{names[second.key]}={value}" if second else ""
            _series(axes, sorted(points, key=lambda point: point[0]), metric,
                    look=LOOKS[at], joined=numeric, label=label)  # fmt: skip
        _scale(axes, first, spots, numeric)
        _frame(axes, names[first.key], PANELS[metric])
        _within_percent(axes.get_ylim, axes.set_ylim)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
    if second:
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper left", frameon=False, labelcolor=INK,
            ncols=min(3, len(labels)),
        )  # fmt: skip


def _series(
    axes: "Axes",
    points: Sequence[tuple[float, Row]],
    metric: str,
    *,
    look: tuple[str, str],
    joined: bool,
    label: str,
) -> None:
    colour, marker = look
    means = [(x, found) for x, row in points if (found := row.spread(metric))]
    for x, row in points:
        if len(values := row.values(metric)) > 1:
            axes.plot([x] * len(values), [100 * v for v in values], ".", color=colour, alpha=0.45,
                      markersize=5)  # fmt: skip
    for x, found in means:
        if found.half is not None:
            ends = [100 * (found.mean - found.half), 100 * (found.mean + found.half)]
            axes.plot([x, x], ends, color=colour, linewidth=1.6)
    axes.plot([x for x, _ in means], [100 * found.mean for _, found in means], marker=marker,
              linestyle="-" if joined else "", color=colour, markersize=7, linewidth=1.6,
              markeredgecolor="white", label=label)  # fmt: skip


def _scale(axes: "Axes", axis: Axis, spots: Mapping[str, float], numeric: bool) -> None:
    """Ticks are the values as they were written, and nothing between them."""
    places = list(spots.values())
    if numeric and min(places) > 0 and max(places) / min(places) > LOG_RATIO:
        axes.set_xscale("log")
        axes.minorticks_off()
    elif not numeric:
        axes.set_xlim(-0.5, len(places) - 0.5)
    crowded = sum(len(_short(value)) for value in axis.values) > 36
    axes.set_xticks(places, [_short(value) for value in axis.values],
                    rotation=30 if crowded else 0, ha="right" if crowded else "center")  # fmt: skip


def _rows(figure: "Figure", results: Results, panels: Sequence[str]) -> None:
    """One row a combination, from top to bottom."""
    colour, marker = LOOKS[0]
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, metric in zip(every, panels, strict=True):
        for at, row in enumerate(results.rows):
            if (found := row.spread(metric)) is None:
                continue
            values = [100 * value for value in row.values(metric)]
            if found.half is not None:
                axes.plot(values, [at] * len(values), ".", color=colour, alpha=0.45, markersize=5)
                ends = [100 * (found.mean - found.half), 100 * (found.mean + found.half)]
                axes.plot(ends, [at, at], color=colour, linewidth=1.6)
            axes.plot([100 * found.mean], [at], marker, color=colour, markersize=7,
                      markeredgecolor="white")  # fmt: skip
        axes.set_yticks(range(len(results.rows)), [_short(row.label) for row in results.rows])
        axes.set_ylim(len(results.rows) - 0.5, -0.5)
        _frame(axes, PANELS[metric], "")
        _within_percent(axes.get_xlim, axes.set_xlim)
        axes.grid(axis="x", color=LINE, linewidth=0.8)


def _frame(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=3, labelleft=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)


def _within_percent(
    limits: Callable[[], tuple[float, float]], set_limits: Callable[[float, float], object]
) -> None:
    """An interval of two seeds may reach beyond 0 and 100 %; the axis need not."""
    low, high = limits()
    set_limits(max(-1.5, low), min(101.5, high))


def _short(text: str) -> str:
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return text if len(text) <= NAME_LENGTH else text[: NAME_LENGTH - 1] + "…"


def _render(paint: Callable[["Figure"], None], panels: int, height: float) -> bytes:
    """Draw on a figure of ``panels`` beside each other, ``height`` inches high."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the figure
        # a value called "$a$" is a name, not a formula
        matplotlib.rcParams.update({"font.size": 10, "text.parse_math": False})
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(4.6 * panels, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()
