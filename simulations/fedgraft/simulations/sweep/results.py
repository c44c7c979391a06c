"""The results of a sweep: one row per combination, means over seeds, and the best row.

The best row has the best mean of the task's headline metric (the first of ``Task.metrics``, such as
accuracy or perplexity) in federated validation, on examples that sites held out of training. Only
if a job holds out no examples, the best row is chosen by the test set. Then the results say so,
because the best of many rows looks better on that test set than it is.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedgraft.common.files import write_text
from fedgraft.common.metrics.metric import Metric
from fedgraft.server.runs.run_folder import Run
from fedgraft.server.state import kept_validation
from fedgraft.simulations.baselines.over_seeds import Spread, spread
from fedgraft.simulations.sweep.grid import Axis, Cell, short_names

__all__ = [
    "METRICS",
    "CellResult",
    "Results",
    "Row",
    "cell_result",
    "gather",
    "write_results",
]

BACKBONE = {"backbone", "backbone.source"}  # keys of a sweep
METRICS = (
    "validation", "test", "macro_f1", "loss", "rounds",
    "bytes_up_per_site_round", "seconds", "peak_memory_mb",
)  # fmt: skip
ChosenBy = Literal["validation", "test"]


@dataclass(frozen=True)
class CellResult:
    """One cell: its run's folder below ``runs/``, and ``metrics`` by the names of ``METRICS``.

    ``validation`` and ``test`` are the task's headline metric, and like macro F1 measured with the
    final federated adapter; shares are fractions. None if not measured. ``error`` is the error of
    a failed cell.
    """

    cell: int
    label: str
    settings: Mapping[str, str]
    seed: int
    status: Literal["finished", "failed", "not finished"]
    run: str | None
    error: str | None
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class Row:
    """One combination with all its seeds."""

    label: str
    settings: Mapping[str, str]
    cells: tuple[CellResult, ...]

    def values(self, metric: str) -> list[float]:
        """Return the metric's values of the cells that have one."""
        found = (cell.metrics.get(metric) for cell in self.cells)
        return [value for value in found if value is not None]

    def spread(self, metric: str) -> Spread | None:
        """Return mean and interval over seeds; None without a value."""
        values = self.values(metric)
        return spread(values) if values else None

    @property
    def complete(self) -> bool:
        """True if every seed finished; a setting that sometimes fails must not be the best."""
        return all(cell.status == "finished" for cell in self.cells)


@dataclass(frozen=True)
class Results:
    """The results of a sweep so far.

    ``best`` is the index of the best row. It was chosen by ``metric``, the task's headline metric,
    on the examples that ``chosen_by`` names.
    """

    folder: Path
    job: str
    axes: tuple[Axis, ...]
    cells: tuple[CellResult, ...]
    rows: tuple[Row, ...]
    chosen_by: ChosenBy | None
    best: int | None
    metric: Metric

    @property
    def swept(self) -> tuple[Axis, ...]:
        """The axes with several values, in the requested order, without the seeds."""
        keys = self.cells[0].settings
        return tuple(axis for axis in self.axes if axis.key in keys)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in order."""
        return tuple(dict.fromkeys(cell.seed for cell in self.cells))

    @property
    def apart(self) -> bool:
        """Whether rows are of several backbones, and the metric does not compare those."""
        return bool(self.metric.parts) and not BACKBONE.isdisjoint(self.cells[0].settings)

    @property
    def failed(self) -> tuple[CellResult, ...]:
        """The cells that failed."""
        return tuple(cell for cell in self.cells if cell.status == "failed")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; ``half`` is half the width of the 95 % interval over seeds."""
        return {
            "sweep": self.folder.name,
            "folder": str(self.folder),
            "job": self.job,
            "swept": {axis.key: list(axis.values) for axis in self.swept},
            "fixed": {a.key: a.values[0] for a in self.axes if len(a.values) == 1},
            "seeds": list(self.seeds),
            "metric": self.metric.key,
            "chosen_by": self.chosen_by,
            "best": self.best,
            "rows": [self._row_json(row) for row in self.rows],
            "cells": [asdict(cell) for cell in self.cells],
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        means = {metric: row.spread(metric) for metric in METRICS}
        return {
            "label": row.label,
            "settings": dict(row.settings),
            "cells": [cell.cell for cell in row.cells],
            "complete": row.complete,
            **{metric: found and asdict(found) for metric, found in means.items()},
        }


def cell_result(cell: Cell, run: Run | None, error: str | None = None) -> CellResult:
    """Return the result of ``cell``, read from its run's folder."""
    summary = run.summary() if run else None
    metrics: dict[str, float | None] = {}
    if run and summary:
        final, headline = summary["final"].get("federated") or {}, run.job.task.metrics[0].key
        kept = kept_validation(run.history(), run.job.rounds.early_stopping)
        metrics = {
            "validation": kept.get(headline) if kept else None,
            "test": final.get(headline),
            **{metric: final.get(metric) for metric in ("macro_f1", "loss")},
            **{metric: summary[metric] for metric in METRICS[4:]},
        }
    failed = error is not None
    return CellResult(
        cell=cell.number,
        label=cell.label,
        settings=cell.settings,
        seed=cell.seed,
        status="finished" if summary else "failed" if failed else "not finished",
        run=run.name if run else None,
        error=error,
        metrics={metric: metrics.get(metric) for metric in METRICS},
    )


def gather(
    folder: Path,
    job: str,
    axes: tuple[Axis, ...],
    cells: Sequence[CellResult],
    metric: Metric,
) -> Results:
    """Return the results: rows in the order of the grid, and the best of the complete rows.

    ``metric`` is the task's headline metric.
    """
    names = short_names(list(cells[0].settings))
    together: dict[tuple[str, ...], list[CellResult]] = {}
    for cell in cells:
        together.setdefault(tuple(cell.settings.values()), []).append(cell)
    rows = tuple(
        Row(_row_label(names, group[0].settings, job), group[0].settings, tuple(group))
        for group in together.values()
    )
    chosen_by = _chosen_by(rows)
    found = Results(folder, job, axes, tuple(cells), rows, chosen_by, None, metric)
    if chosen_by is None or len(rows) < 2 or found.apart:
        return found
    return replace(found, best=_best(rows, chosen_by, metric))


def _row_label(names: Mapping[str, str], settings: Mapping[str, str], job: str) -> str:
    return " ".join(f"{names[key]}={value}" for key, value in settings.items()) or job


def _chosen_by(rows: Sequence[Row]) -> ChosenBy | None:
    """Return the metric for the ranking: validation if each finished cell has it, else test.

    One ranking with both metrics would be unfair. It is None if neither is there for all cells.
    """
    metrics: tuple[ChosenBy, ...] = ("validation", "test")
    done = [cell for row in rows for cell in row.cells if cell.status == "finished"]
    for metric in metrics:
        if done and all(cell.metrics[metric] is not None for cell in done):
            return metric
    return None


def _best(rows: Sequence[Row], chosen_by: ChosenBy, metric: Metric) -> int | None:
    means = {
        at: found.mean
        for at, row in enumerate(rows)
        if row.complete and (found := row.spread(chosen_by))
    }
    pick = max if metric.higher else min
    return pick(means, key=lambda at: means[at]) if means else None


def write_results(results: Results) -> None:
    """Write ``results.json`` into the sweep's folder; an older file is replaced as a whole."""
    write_text(results.folder / "results.json", json.dumps(results.to_json(), indent=1) + "\n")
