"""The report's figures of training: the changed modules, and a map of the sites' directions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedgraft.server.report import plots
from fedgraft.server.report.plots import INK, LINE, MODELS, MUTED, PAPER, Picture, frame, short_name
from fedgraft.server.report.values import Record, as_share, read_number, read_record, read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["map_facts", "movement_facts"]

BARS = 24  # above, one bar per module is too long to read
TABLED = 20  # sites; a larger table of cosines is too large to read
NAME = 30  # characters of a module's name; its end is kept, because the end identifies the module


def movement_facts(summary: Record) -> dict[str, object]:
    """Return the changed modules, largest change first, and a bar chart of the first ``BARS``."""
    rows = [
        (str(one.get("module")), read_number(one.get("relative")), one)
        for one in read_records(summary, "moved")
    ]
    known = sorted(
        [(share, name, one) for name, share, one in rows if share is not None],
        key=lambda row: (-row[0], row[1]),
    )
    rest = [one for _, share, one in rows if share is None]
    ordered = [one for *_, one in known] + rest
    return {"moved": ordered, "moved_picture": _bars(known[:BARS], len(known)) if known else None}


def _bars(rows: Sequence[tuple[float, str, Record]], total: int) -> Picture:
    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for at, (share, _, one) in enumerate(rows):
            paint = MODELS["federated" if one.get("low_rank") else "head_only"].paint
            axes.barh(at, 100 * share, color=paint, height=0.66)
        axes.set_yticks(range(len(rows)), [_module(name) for _, name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        frame(axes, "change, % of the norm of the weights", "")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=LINE, linewidth=0.8)

    most = f"the {len(rows)} that moved most of {total}" if total > len(rows) else f"all {total}"
    said = "; ".join(f"{name} {as_share(share)}" for share, name, _ in rows[:5])
    return Picture(
        plots.render(draw, 19 * len(rows) + 60, "moved"),
        f"Bar chart of relative changes of weights, {most}. First: {said}.",
        f"How far training moved each module, {most}: the norm of the change over the norm of the "
        "weights it is added to. Modules that are trained themselves, such as a head, have the "
        "other colour.",
    )


def _module(name: str) -> str:
    return name if len(name) <= NAME else "…" + name[1 - NAME :]


def map_facts(summary: Record) -> dict[str, object]:
    """Return the map of the sites with its table of cosines, or the reason why there is none."""
    found = read_record(summary, "site_map")
    absent = found.get("absent")
    names, places = _strings(found.get("sites")), _numbers(found.get("places"), 2)
    between = _numbers(found.get("cosine"), len(names))
    if not names or len(places) != len(names) or len(between) != len(names):
        told = absent if isinstance(absent, str) else ""
        return {"map_absent": told, "map_picture": None, "map_rows": [], "map_sites": []}
    rows = list(zip(names, between, strict=True)) if len(names) <= TABLED else []
    return {
        "map_absent": "",
        "map_picture": _map(names, places, read_number(found.get("explained"))),
        "map_rows": rows,
        "map_sites": names,
    }


def _map(names: Sequence[str], places: Sequence[Sequence[float]], shown: float | None) -> Picture:
    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        xs, ys = ([place[axis] for place in places] for axis in (0, 1))
        axes.axhline(0, color=LINE, linewidth=0.8)
        axes.axvline(0, color=LINE, linewidth=0.8)
        axes.plot(
            xs, ys, "o", color=MODELS["local_only"].paint, markersize=7, markeredgecolor=PAPER
        )
        for name, x, y in zip(names, xs, ys, strict=True):
            axes.annotate(
                short_name(name), (x, y), (0, 6), textcoords="offset points", ha="center",
                color=INK, fontsize=11 if len(names) <= 20 else 8,
            )  # fmt: skip
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.18)
        frame(axes, "", "")
        axes.tick_params(labelcolor=MUTED)

    share = "" if shown is None else f" The plane shows {as_share(shown)} of all differences."
    return Picture(
        plots.render(draw, 400, "map"),
        f"Map of {len(names)} sites by the direction of their own training; the cosines are in "
        "the table.",
        "Sites near each other pull the model in the same direction; distances are those between "
        f"unit vectors, by classical multidimensional scaling.{share}",
    )


def _strings(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []


def _numbers(value: object, width: int) -> list[list[float]]:
    """Return rows of ``width`` finite numbers; no rows if one row is different."""
    rows = []
    for row in value if isinstance(value, list) else []:
        numbers = [read_number(one) for one in row] if isinstance(row, list) else []
        if len(numbers) != width or None in numbers:
            return []
        rows.append([one for one in numbers if one is not None])
    return rows
