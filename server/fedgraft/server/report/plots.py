"""The figures of a run's report, as inline SVG that follows the page's light or dark palette.

Matplotlib paints with stand-in colours, which become CSS variables afterwards: one file serves
both colour schemes and print, and a model has one colour and one marker in every figure. Text
stays text, so it can be read aloud, searched and selected. Figures are drawn as narrow as a phone,
so that no screen shrinks their labels. No date, random id or font file: equal input, equal bytes.

Matplotlib is imported when a figure is drawn: reading a run's numbers needs none of it.
"""

import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "INK",
    "LINE",
    "MODELS",
    "MUTED",
    "PAPER",
    "Curve",
    "Estimate",
    "Look",
    "Picture",
    "curves",
    "density",
    "dots",
    "frame",
    "render",
    "scatter",
    "short_name",
    "single_dots",
    "within_percent",
]

Draw = Callable[["Figure"], None]


@dataclass(frozen=True)
class Look:
    """The name, marker and colour of a series; ``variable`` is the page's CSS variable."""

    name: str
    marker: str
    paint: str
    variable: str


# The hues are those of Okabe and Ito, told apart with any common colour blindness; the page sets
# them (and their dark counterparts) with enough contrast. Markers repeat what colours say.
MODELS = {
    "federated": Look("Federated", "o", "#fe0001", "--federated"),
    "federated_tuned": Look("Federated + fine-tune", "D", "#fe0002", "--tuned"),
    "local_only": Look("Local only", "s", "#fe0003", "--local"),
    "central": Look("Central", "^", "#fe0004", "--central"),
    "head_only": Look("Head only", "v", "#fe0005", "--head"),
    "zero_shot": Look("Zero-shot", "X", "#fe0006", "--zero"),
}
INK, MUTED, LINE, PAPER = "#fe0007", "#fe0008", "#fe0009", "#fe000a"
_VARIABLES = {look.paint: look.variable for look in MODELS.values()} | {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    PAPER: "--paper",
}
_WIDTH = 420  # points; one point is one CSS pixel at full size
_NAME_LENGTH = 22
_SQUARE = 5  # percentage points: one test example of twenty
_MARKER_ROUNDS = 40  # above, a marker per round is a smear


@dataclass(frozen=True)
class Estimate:
    """A metric's value and its 95 % interval; None if it has none. Shares are fractions."""

    value: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Picture:
    """A figure of the page. ``alt`` is read aloud instead of it; ``caption`` is below it."""

    svg: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Curve:
    """A metric of the federated model over rounds: one value per round, None if not measured.

    A figure has at most one ``second`` curve; it is dashed, so that no reader needs the colours.
    """

    name: str
    values: Sequence[float | None]
    second: bool = False


def curves(
    rounds: Sequence[int],
    lines: Sequence[Curve],
    *,
    dropped: Sequence[int],
    label: str,
    percent: bool,
    key: str,
) -> str:
    """Draw lines over rounds, with a mark at the foot of every round that lost sites.

    Args:
        rounds: the x axis; every curve has one value per round.
        lines: what to draw.
        dropped: rounds in which at least one site was dropped.
        label: name of the y axis.
        percent: whether values are fractions to be shown as percent.
        key: makes the ids inside this figure differ from those of the page's other figures.

    Returns:
        An ``<svg>`` element.
    """

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for line in lines:
            _line(axes, rounds, line, 100 if percent else 1)
        if dropped:
            axes.scatter(
                dropped, [0.025] * len(dropped), marker="x", s=34, color=INK, linewidths=1.6,
                transform=axes.get_xaxis_transform(), label="sites dropped", zorder=4,
            )  # fmt: skip
        frame(axes, "round", f"{label} (%)" if percent else label)
        axes.locator_params(axis="x", integer=True)
        if len(rounds) == 1:
            axes.set_xticks(list(rounds))
        if percent:
            within_percent(axes, "y", axes.dataLim.y0)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        _legend(figure)

    return render(draw, 290, key)


def dots(
    rows: Sequence[tuple[str, dict[str, Estimate]]], models: Sequence[str], *, label: str, key: str
) -> str:
    """Draw one row per name, with one marker and its interval per model.

    Args:
        rows: name and estimates by model, top to bottom.
        models: keys of ``MODELS`` to draw, in this order within a row.
        label: name of the x axis, percent.
        key: as for ``curves``.

    Returns:
        An ``<svg>`` element.
    """

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for index, model in enumerate(models):
            offset = (index - (len(models) - 1) / 2) * 0.22
            points = [(at + offset, found[model]) for at, (_, found) in enumerate(rows)]
            _interval_points(axes, points, MODELS[model])
        for at in range(1, len(rows)):
            axes.axhline(at - 0.5, color=LINE, linewidth=0.6)
        _name_rows(axes, [short_name(name) for name, _ in rows], label)
        _legend(figure)

    return render(draw, len(rows) * (15 * len(models) + 4) + 95, key)


def single_dots(rows: Sequence[tuple[str, Estimate]], *, label: str, key: str) -> str:
    """Draw one row with one marker per model; ``rows`` are keys of ``MODELS`` with estimates."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for at, (model, estimate) in enumerate(rows):
            _interval_points(axes, [(at, estimate)], MODELS[model])
        _name_rows(axes, [MODELS[model].name for model, _ in rows], label)

    return render(draw, 28 * len(rows) + 50, key)


def scatter(pairs: Sequence[tuple[float, float]], *, key: str) -> str:
    """Draw a share of federated over local only, one mark per site, with the line of equality.

    Args:
        pairs: (local-only, federated) as fractions.
        key: as for ``curves``.

    Returns:
        An ``<svg>`` element.
    """

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        values = [100 * value for pair in pairs for value in pair]
        least = min(values)
        low, high = least - 4 if least < 0 else max(0.0, least - 4), min(100.0, max(values) + 4)
        axes.scatter(
            [100 * local for local, _ in pairs],
            [100 * federated for _, federated in pairs],
            s=26, facecolor=MODELS["federated"].paint, edgecolor=PAPER, linewidths=0.6, alpha=0.75,
        )  # fmt: skip
        _face_to_face(axes, low, high)

    return render(draw, 400, key)


def density(pairs: Sequence[tuple[float, float]], *, key: str) -> str:
    """Draw ``scatter`` for so many sites that only their number in a square can be shown.

    A square is ``_SQUARE`` points wide, its opacity the square root of its share of the fullest.
    """
    squares = Counter((_square(local), _square(federated)) for local, federated in pairs)
    fullest = max(squares.values())

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        half = _SQUARE / 2
        for (column, row), count in sorted(squares.items()):
            left, foot = _SQUARE * column - half, _SQUARE * row - half
            axes.fill(
                [left, left + _SQUARE, left + _SQUARE, left],
                [foot, foot, foot + _SQUARE, foot + _SQUARE],
                color=MODELS["federated"].paint, linewidth=0,
                alpha=round(max(0.08, math.sqrt(count / fullest)), 2),
            )  # fmt: skip
        places = [_SQUARE * place for square in squares for place in square]
        low, high = min(places) - half, max(places) + half
        _face_to_face(axes, low, high)
        axes.set(xlim=(low, high), ylim=(low, high + 0.1 * (high - low)))  # words above the squares

    return render(draw, 400, key)


def _square(share: float) -> int:
    return math.floor(100 * share / _SQUARE + 0.5)


def _face_to_face(axes: "Axes", low: float, high: float) -> None:
    """Draw the line of equality from ``low`` to ``high``, in percent, and name its two sides."""
    axes.plot([low, high], [low, high], color=MUTED, linewidth=1, linestyle="--")
    axes.text(0.03, 0.96, "federated better", transform=axes.transAxes, color=MUTED, va="top")
    axes.text(0.97, 0.04, "local only better", transform=axes.transAxes, color=MUTED, ha="right")
    axes.set_aspect("equal")
    frame(axes, "Local only, own test (%)", "Federated, own test (%)")
    axes.grid(color=LINE, linewidth=0.8)


def _line(axes: "Axes", rounds: Sequence[int], line: Curve, scale: float) -> None:
    kept = [
        (at, scale * value)
        for at, value in zip(rounds, line.values, strict=True)
        if value is not None
    ]
    if kept:
        axes.plot(
            [at for at, _ in kept],
            [value for _, value in kept],
            color=MUTED if line.second else MODELS["federated"].paint,
            linestyle="--" if line.second else "-",
            marker="" if len(kept) > _MARKER_ROUNDS else "D" if line.second else "o",
            markersize=4.5,
            linewidth=1.8,
            label=line.name,
        )


def _interval_points(axes: "Axes", points: Sequence[tuple[float, Estimate]], look: Look) -> None:
    kept = [(at, found.value, found.interval) for at, found in points if found.value is not None]
    for at, _, interval in kept:
        if interval is not None:
            axes.plot([100 * end for end in interval], [at, at], color=look.paint, linewidth=1.8)
    if kept:
        axes.plot(
            [100 * value for _, value, _ in kept], [at for at, _, _ in kept], look.marker,
            color=look.paint, markersize=6, markeredgecolor=PAPER, markeredgewidth=0.7,
            label=look.name,
        )  # fmt: skip


def _name_rows(axes: "Axes", names: Sequence[str], label: str) -> None:
    """Name the rows from top to bottom, and draw a percent axis below them."""
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    frame(axes, f"{label} (%)", "")
    within_percent(axes, "x", axes.dataLim.x0)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.tick_params(axis="y", length=0)


def within_percent(axes: "Axes", axis: Literal["x", "y"], lowest: float) -> None:
    """Cut an axis at 0 and 100 %, leaving room for half a marker.

    The least share is ``lowest``, in percent. If it is below 0, as R2 of a poor model is, the axis
    is not cut at 0.
    """
    low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
    limits = (low if lowest < 0 else max(-1.5, low), min(101.5, high))
    (axes.set_xlim if axis == "x" else axes.set_ylim)(*limits)


def frame(axes: "Axes", x: str, y: str) -> None:
    """Label the axes and hide the lines that nobody needs."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)


def _legend(figure: "Figure") -> None:
    if not figure.axes[0].get_legend_handles_labels()[0]:
        return
    figure.legend(
        loc="outside upper left", ncols=2, frameon=False, labelcolor=INK, handlelength=1.4,
        columnspacing=1.4, borderaxespad=0.1,
    )  # fmt: skip


def short_name(name: str) -> str:
    """Return a name that is short enough for a figure."""
    # JSON can hold control characters and lone surrogates, which cannot be drawn.
    name = " ".join("".join(sign if sign.isprintable() else " " for sign in name).split())
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def render(draw: Draw, height: float, key: str) -> str:
    """Draw on a figure ``_WIDTH`` wide and return its ``<svg>`` element."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "font.size": 12,
        "font.family": ["sans-serif"],
        "svg.fonttype": "none",
        "svg.hashsalt": f"fedgraft-{key}",
        "text.parse_math": False,  # a site called "a$b$" is a name, not a formula
        "axes.unicode_minus": False,
    }
    written = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the report
        matplotlib.rcParams.update(style)
        # Only the layout measures with matplotlib's font; the browser has the missing glyphs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _inline(written.getvalue())


def _inline(document: str) -> str:
    """Turn matplotlib's document into an element of the page: no prolog, ids or fixed colours."""
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # Its rules would hold for the whole page; the page has its own for figures.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    # Groups are named alike in every figure and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<[^>]*>", _paint, svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _paint(tag: re.Match[str]) -> str:
    """Replace colours inside tags only, so that names and labels stay as they are."""
    text = re.sub(r" font-family: [^;\"]*;?| transform=\"rotate\(-0 [^\"]*\"", "", tag[0])
    return re.sub(r"#fe00[0-9a-f]{2}", lambda found: f"var({_VARIABLES[found[0]]})", text)
